"""Makes a video from the command line: opens the engine, shows the plan and progress, prints the result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kadr.cli.stdout_video import copy_to_stdout
from kadr.cli.terminal.errors import print_stderr, print_stdout
from kadr.cli.terminal.output import print_path
from kadr.cli.terminal.preview import TerminalPreview
from kadr.cli.terminal.progress import show_progress
from kadr.errors import RequestError
from kadr.media.encoders.formats import DEFAULT_ENCODING, Encoding
from kadr.pipeline.display.progress_lines import format_duration
from kadr.request.request import Request
from kadr.request.windows import window_folder_path
from kadr.schema import LATENTS

if TYPE_CHECKING:
    from kadr.pipeline.engine import Engine
    from kadr.pipeline.video import VideoFile
    from kadr.planning.plan import Plan


def open_engine(model: str | Path, **options: Any) -> Engine:
    """Calls `Engine.open`, imported late because it loads torch."""
    from kadr.pipeline.engine import Engine

    return Engine.open(model, **options)


def calibrate(engine: Engine) -> None:
    """Measures how fast this machine is and stores it for later plans. Progress goes to stderr."""
    from kadr.pipeline.calibrate import calibrate_machine  # loads torch

    path = calibrate_machine(engine.spec, report=lambda step: print_stderr(f"calibration: {step}"))
    print_stderr(f"calibration: stored in {path}")


def write_video(
    engine: Engine,
    request: Request,
    output: Path,
    *,
    latents_path: Path | None = None,
    as_json: bool = False,
    resume: bool = False,
    kernels: Any = None,
    position: tuple[int, int] | None = None,
    preview: TerminalPreview | None = None,
    encoding: Encoding = DEFAULT_ENCODING,
    to_stdout: bool = False,
) -> None:
    """Makes the video and prints its path, or a JSON summary, on stdout.

    Args:
        resume, kernels: as for `Engine.write`.
        position: of several videos, (number of this one, number of videos).
        preview: shows the preview of each step.
        encoding: as for `Engine.write`.
        to_stdout: write the video itself to stdout, instead of its path.
    """
    flags = "--resume"  # that resume it
    if position is not None:
        flags = f"its prompt, --seed {request.seed} --output {output} --resume"
    more: dict[str, Any] = ({"kernels": kernels} if kernels else {}) | ({} if preview is None else {"preview": True})
    more |= {} if encoding == DEFAULT_ENCODING else {"encoding": encoding}
    with _report_finished_windows(output, flags), show_progress(position, preview) as watch:
        video_file = engine.write(request, output, watch=watch, on_plan=print_plan, resume=resume, **more)
    report = summary(engine, video_file)
    if latents_path is not None:
        save_latents(video_file, latents_path, report)
    frames = f"{video_file.frames} frame{'s' if video_file.frames != 1 else ''}"
    duration = format_duration(video_file.seconds)
    print_stderr(f"{frames} of {video_file.size} at {video_file.fps:g} per second, made in {duration}")
    outcome = f"the video is written to {video_file.path}, but its path could not be printed:"
    if to_stdout:
        copy_to_stdout(video_file.path)
    elif as_json:
        print_stdout(json.dumps(report), outcome=outcome)
    else:
        print_path(video_file.path, outcome=outcome)


@contextmanager
def _report_finished_windows(output: Path, flags: str) -> Iterator[None]:
    """Prints how many windows of a long video are finished, and the flags that resume it, if it is interrupted."""
    try:
        yield
    except BaseException as error:
        from kadr.pipeline.longvideo.window_folder import finished_windows  # loads torch

        finished = len(finished_windows(window_folder_path(output)))
        if finished and not isinstance(error, RequestError):
            windows = "window is" if finished == 1 else "windows are"
            print_stderr(f"{finished} finished {windows} kept; resume the video with {flags}")
        raise


def print_plan(plan: Plan) -> None:
    """Prints peak memory and time, and the reasons for the placements."""
    print_stderr(f"plan: {plan.summary()}")
    for reason in plan.reasons():
        print_stderr(f"plan: {reason}")


def summary(engine: Engine, video_file: VideoFile) -> dict[str, Any]:
    """Returns the object that --json prints."""
    return {
        "path": str(video_file.path),
        "size": str(video_file.size),
        "frames": video_file.frames,
        "fps": video_file.fps,
        "seconds": round(video_file.seconds, 3),
        "model_name": engine.spec.name,
        "seed": video_file.request.seed,
        "request": video_file.request.to_json(),
        "notices": list(video_file.notices),
    }


def save_latents(video_file: VideoFile, path: Path, summary: dict[str, Any]) -> None:
    """Writes the latents, float32 (128, f, h, w), as the tensor "latents", with the request as metadata."""
    from kadr.checkpoints.save import write_tensors

    stored = LATENTS.stamp({key: summary[key] for key in ("model_name", "request")})
    metadata = {"kadr": json.dumps(stored)}
    write_tensors(path, {"latents": video_file.latents}, dtype=video_file.latents.dtype, metadata=metadata)
