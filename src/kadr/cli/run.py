"""What every verb that makes a video does: find a name for it, refuse early, make it, tell."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kadr.cli.terminal.errors import print_stderr
from kadr.cli.terminal.progress import format_duration, show_progress
from kadr.errors import MediaError, RequestError
from kadr.request.request import Request, refuse_overwriting
from kadr.request.windows import WINDOWS_SUFFIX, window_folder_path
from kadr.shapes import Size

if TYPE_CHECKING:
    from kadr.pipeline.engine import Engine
    from kadr.pipeline.video import VideoFile
    from kadr.planning.plan import Plan

DEFAULT_OUTPUT = "out.mp4"


def open_engine(model: str | Path, **options: Any) -> Engine:
    """`Engine.open`, loaded when it is needed: with it comes torch."""
    from kadr.pipeline.engine import Engine

    return Engine.open(model, **options)


def choose_output(requested_path: Path | None, *, resume: bool = False) -> Path:
    """Where the video goes. Nothing is replaced that was not named, and no video that is not finished.

    Args:
        resume: a long video that was cut off is to be gone on with.

    Raises:
        RequestError: there are several of these.
    """
    if requested_path is not None and not requested_path.is_dir():
        return requested_path
    return next_free_path(Path(requested_path or "") / DEFAULT_OUTPUT, resume=resume)


def next_free_path(path: Path, *, resume: bool = False) -> Path:
    """The path, or the next of clip-2.mp4, clip-3.mp4, ... that is free; or that of a video that is not finished.

    Raises:
        RequestError: as `choose_output`.
    """
    if resume:
        return _unfinished_video(path)
    others = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return path if _is_free(path) else next(filter(_is_free, others))


def _is_free(path: Path) -> bool:
    return not path.exists() and not _has_windows(window_folder_path(path))


def _has_windows(folder: Path) -> bool:
    return any(folder.glob("window-*.safetensors"))


def _unfinished_video(usual: Path) -> Path:
    """The video, of those that would be called so, that is not finished."""
    numbered = re.compile(rf"{re.escape(usual.stem)}(-\d+)?{re.escape(WINDOWS_SUFFIX)}")
    home = usual.parent.iterdir() if usual.parent.is_dir() else ()
    found = sorted(folder for folder in home if numbered.fullmatch(folder.name) and _has_windows(folder))
    if len(found) > 1:
        names = ", ".join(str(folder.with_suffix(usual.suffix)) for folder in found)
        raise RequestError(f"several videos are not finished: {names}. Name the one to go on with as --output.")
    return found[0].with_suffix(usual.suffix) if found else usual


def refuse_missing_media(request: Request) -> None:
    """Say which pictures and clips are not there, before anything is loaded or fetched.

    Raises:
        MediaError: some are not.
    """
    absent = [str(path) for path in request.media_paths() if not path.is_file()]
    if absent:
        raise MediaError(f"there is no file {', '.join(absent)}. Check the path of the picture or clip.")


def refuse_unwritable(request: Request, output: Path, latents_path: Path | None) -> None:
    """Say what cannot be written, before anything is loaded or fetched.

    Raises:
        MediaError: a file cannot be written where it should go.
        RequestError: the video would replace what it is made from.
    """
    from kadr.media.writer import VideoWriter

    refuse_overwriting(request, output)
    size = request.size if isinstance(request.size, Size) else Size(2, 2)
    VideoWriter(output, size, request.fps or 24)  # refuses at birth what it could not write
    if latents_path is None:
        return
    if latents_path.suffix != ".safetensors":
        raise MediaError(f"{latents_path} does not end in .safetensors. Name it {latents_path.stem}.safetensors.")
    if not latents_path.parent.is_dir():
        raise MediaError(f"the folder {latents_path.parent} does not exist. Make it first, or choose another.")


def write_video(
    engine: Engine,
    request: Request,
    output: Path,
    *,
    latents_path: Path | None = None,
    as_json: bool = False,
    resume: bool = False,
) -> None:
    """Make the video and print its path, or all about it as JSON, on stdout. resume: as of `Engine.write`."""
    with _report_finished_windows(output), show_progress() as watch:
        made = engine.write(request, output, watch=watch, on_plan=print_plan, resume=resume)
    told = summary(engine, made)
    if latents_path is not None:
        save_latents(made, latents_path, told)
    print_stderr(
        f"{made.frames} frames of {made.size} at {made.fps:g} per second, made in {format_duration(made.seconds)}"
    )
    print(json.dumps(told) if as_json else made.path)


@contextmanager
def _report_finished_windows(output: Path) -> Iterator[None]:
    """Say what has been kept of a long video, if it is not finished."""
    try:
        yield
    except BaseException as error:
        from kadr.pipeline.longvideo.window_folder import finished_windows  # loads torch

        kept = len(finished_windows(window_folder_path(output)))
        if kept and not isinstance(error, RequestError):
            print_stderr(
                f"{kept} finished {'window is' if kept == 1 else 'windows are'} kept; --resume goes on with the video"
            )
        raise


def print_plan(plan: Plan) -> None:
    """Say what the run will take, and what is done about it."""
    print_stderr(f"plan: {plan.summary()}")
    for reason in plan.reasons():
        print_stderr(f"plan: {reason}")


def summary(engine: Engine, video_file: VideoFile) -> dict[str, Any]:
    """What --json prints."""
    return {
        "path": str(video_file.path),
        "size": str(video_file.size),
        "frames": video_file.frames,
        "fps": video_file.fps,
        "seconds": round(video_file.seconds, 3),
        "model": engine.model_name,
        "seed": video_file.request.seed,
        "request": video_file.request.to_json(),
    }


def save_latents(video_file: VideoFile, path: Path, summary: dict[str, Any]) -> None:
    """Write the latents, float32 (128, f, h, w), under the name "latents", and the request as metadata."""
    from kadr.checkpoints.save import write_tensors

    metadata = {"kadr": json.dumps({key: summary[key] for key in ("model", "request")})}
    write_tensors(path, {"latents": video_file.latents}, dtype=video_file.latents.dtype, metadata=metadata)
