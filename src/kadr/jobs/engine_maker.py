"""`EngineMaker`: makes the video of a job with an engine, which stays open for the next job of the same model."""

from __future__ import annotations

import gc
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kadr.cancellation import CancelToken
from kadr.errors import KadrError, KadrWarning, RequestError
from kadr.file_names import replace_file
from kadr.jobs.job import canonical_json
from kadr.jobs.stills import write_stills
from kadr.media.webp import encode_webp
from kadr.media.writer import PARTIAL_PATTERN
from kadr.pipeline.progress import Progress
from kadr.planning.plan import Plan
from kadr.request.request import Request
from kadr.request.windows import window_folder_path

if TYPE_CHECKING:
    from kadr.pipeline.engine import Engine
    from kadr.pipeline.video import VideoFile

VIDEO_FILE, THUMBNAIL_FILE, SPRITESHEET_FILE = "video.mp4", "thumbnail.jpg", "spritesheet.jpg"
SECONDS_BETWEEN_PREVIEWS, PREVIEW_SECONDS = 0.5, 2.0  # and the time in which one plays
_LAYERS_PER_STAGE = 20  # at least, so that a layer takes at most that part of the stage

Report = Callable[[str, Any], None]


@dataclass(frozen=True)
class Task:
    """A job as a worker gets it.

    Args:
        job_id, fence: of the claim.
        engine: see `NewJob`.
        request: see `NewJob`.
        folder: of the job; paths of media are relative to it.
        output: the folder for what is made, which does not exist yet.
    """

    job_id: str
    fence: int
    engine: Mapping[str, Any]
    request: Mapping[str, Any]
    folder: Path
    output: Path


@dataclass
class EngineMaker:
    """Makes videos, one at a time.

    Args:
        options: arguments of `Engine.open` for every job, unless its own differ.
        previews: report a preview after a step, at most one each half second.
        writes_stills: also write a thumbnail and a spritesheet.
        stores_paths: see `Engine.write`.
        opens_first: see `NewJob.engine`; opened before the first job, if it is on disk.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    previews: bool = False
    writes_stills: bool = True
    stores_paths: bool = True
    opens_first: Mapping[str, Any] | None = None
    _engine: Engine | None = field(default=None, init=False, repr=False)
    _engine_key: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        if self.opens_first is not None:
            with suppress(KadrError):  # its first job says what is wrong
                self._open(self.opens_first)

    @property
    def warm_engines(self) -> tuple[str, ...]:
        """Canonical JSON of the engine that is open."""
        return (self._engine_key,) if self._engine is not None else ()

    @property
    def device_bytes(self) -> int:
        """Bytes of the device that this process takes, and that its next job can have."""
        from kadr.memory.device import private_bytes  # loads torch, as the engine has

        return 0 if (engine := self._engine) is None else private_bytes(engine.spec.device)

    def make(self, task: Task, report: Report, token: CancelToken) -> dict[str, Any]:
        """Makes the video of a job and returns its result.

        Args:
            report: called with a kind of report and its data: "load", "plan", "progress", "preview", "notice".
            token: cancels it.

        Raises:
            KadrError: as `Engine.write`.
            OSError: a file cannot be written.
        """
        began = time.monotonic()
        report("load", True)  # until the first stage: the model is opened, and fetched where it is missing
        with _report_warnings(report):
            engine = self._open(task.engine)
            request = with_media_in(Request.from_json(task.request), task.folder)
            task.output.mkdir(parents=True, exist_ok=True)
            write = partial(
                engine.write,
                request,
                watch=_Watcher(report, self.previews),
                preview=self.previews,
                on_plan=lambda plan: report("plan", describe_plan(plan)),
                on_load=partial(report, "load"),
                cancel=token,
                stores_paths=self.stores_paths,
            )
            if request.windows is None:
                video = write(task.output / VIDEO_FILE)
            else:
                video = _write_windows(write, task, report)
            if self.writes_stills:
                write_stills(task.output / VIDEO_FILE, task.output / THUMBNAIL_FILE, task.output / SPRITESHEET_FILE)
        return describe_video(video, engine, began)

    def _open(self, options: Mapping[str, Any]) -> Engine:
        from kadr.pipeline.engine import Engine  # loads torch

        key = canonical_json(options)
        if self._engine is None or key != self._engine_key:
            self._engine = None  # the memory of one must be free before the next is opened
            gc.collect()
            self._engine, self._engine_key = Engine.open(**{**self.options, **options}), key
        return self._engine


class _Watcher:
    """Reports progress, and a preview with it where the last one is old enough."""

    def __init__(self, report: Report, previews: bool) -> None:
        self._report, self._previews, self._next_preview_at = report, previews, 0.0

    def __call__(self, progress: Progress) -> None:
        self._report("progress", describe_progress(progress))
        if not self._previews or time.monotonic() < self._next_preview_at:
            return
        if (frames := progress.preview) is not None:
            self._report("preview", encode_webp(frames, PREVIEW_SECONDS))
            self._next_preview_at = time.monotonic() + SECONDS_BETWEEN_PREVIEWS


def _write_windows(write: Callable[..., VideoFile], task: Task, report: Report) -> VideoFile:
    """Writes a long video, from the finished windows of an earlier attempt if there are any.

    It is written in the job's folder, where the windows stay when a worker dies; what an attempt has in its own goes.

    Args:
        write: `Engine.write` of the request.
    """
    path = task.folder / VIDEO_FILE
    windows = window_folder_path(path)
    for leftover in task.folder.glob(PARTIAL_PATTERN):
        leftover.unlink()
    has_windows = windows.is_dir() and any(windows.iterdir())
    try:
        video = write(path, resume=has_windows)
    except RequestError as error:
        if not has_windows:
            raise
        report("notice", f"The windows of an earlier attempt cannot be used, and are made again: {error}")
        shutil.rmtree(windows)
        video = write(path)
    replace_file(path, task.output / VIDEO_FILE)
    return video


def with_media_in(request: Request, folder: Path) -> Request:
    """Returns a request with the paths of its media in a folder, to which they are relative; absolute ones stay."""
    conditions = tuple(replace(item, media=str(folder / item.media)) for item in request.conditions)
    controls = tuple(replace(item, media=str(folder / item.media)) for item in request.controls)
    input_video = None if request.input_video is None else str(folder / request.input_video)
    return replace(request, conditions=conditions, controls=controls, input_video=input_video)


def describe_progress(progress: Progress) -> dict[str, Any]:
    """Returns a progress report as plain data."""
    return {
        "stage": progress.stage,
        "step": progress.step,
        "of": progress.of,
        "sigma": progress.sigma,
        "eta": progress.eta,
        "window": progress.window and list(progress.window),
    }


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Returns what a supervisor needs of a plan: seconds of each stage, the longest of a layer, and the peak."""
    slowest = plan.seconds_range[1] / plan.seconds if plan.seconds else 1.0
    stage_seconds = {stage.stage: plan.stage_seconds(stage) * slowest for stage in plan.stages}
    return {
        "stage_seconds": stage_seconds,
        "layer_seconds": max(stage_seconds.values(), default=0.0) / _LAYERS_PER_STAGE,
        "seconds": plan.seconds,
        "peak_bytes": plan.peak_bytes,
    }


def describe_video(video: VideoFile, engine: Engine, began: float) -> dict[str, Any]:
    """Returns the result of a job."""
    return {
        "file": video.path.name,
        "size": str(video.size),
        "frames": video.frames,
        "fps": video.fps,
        "seed": video.request.seed,
        "model_name": engine.spec.name,
        "request": video.request.to_json(),
        "notices": list(video.notices),
        "inference_seconds": round(time.monotonic() - began, 3),
    }


@contextmanager
def _report_warnings(report: Report) -> Iterator[None]:
    """Reports what is degraded on the way, as it happens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", KadrWarning)
        warnings.showwarning = lambda message, *args, **kwargs: report("notice", str(message))
        yield
