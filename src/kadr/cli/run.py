"""What every verb that makes a video does: find a name for it, refuse early, make it, tell."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kadr.cli.terminal.errors import say
from kadr.cli.terminal.progress import duration, shown
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


def chosen_output(asked: Path | None, *, resume: bool = False) -> Path:
    """Where the video goes. Nothing is replaced that was not named, and no video that is not finished.

    Args:
        resume: a long video that was cut off is to be gone on with.

    Raises:
        RequestError: there are several of these.
    """
    if asked is not None and not asked.is_dir():
        return asked
    return unnamed(Path(asked or "") / DEFAULT_OUTPUT, resume=resume)


def unnamed(path: Path, *, resume: bool = False) -> Path:
    """The path, or the next of clip-2.mp4, clip-3.mp4, ... that is free; or that of a video that is not finished.

    Raises:
        RequestError: as `chosen_output`.
    """
    if resume:
        return _begun(path)
    others = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return path if _is_free(path) else next(filter(_is_free, others))


def _is_free(path: Path) -> bool:
    return not path.exists() and not _has_windows(window_folder_path(path))


def _has_windows(folder: Path) -> bool:
    return any(folder.glob("window-*.safetensors"))


def _begun(usual: Path) -> Path:
    """The video, of those that would be called so, that is not finished."""
    numbered = re.compile(rf"{re.escape(usual.stem)}(-\d+)?{re.escape(WINDOWS_SUFFIX)}")
    home = usual.parent.iterdir() if usual.parent.is_dir() else ()
    found = sorted(folder for folder in home if numbered.fullmatch(folder.name) and _has_windows(folder))
    if len(found) > 1:
        names = ", ".join(str(folder.with_suffix(usual.suffix)) for folder in found)
        raise RequestError(f"several videos are not finished: {names}. Name the one to go on with as --output.")
    return found[0].with_suffix(usual.suffix) if found else usual


def refuse_absent(request: Request) -> None:
    """Say which pictures and clips are not there, before anything is loaded or fetched.

    Raises:
        MediaError: some are not.
    """
    absent = [str(path) for path in request.media_paths() if not path.is_file()]
    if absent:
        raise MediaError(f"there is no file {', '.join(absent)}. Check the path of the picture or clip.")


def refuse_unwritable(request: Request, output: Path, latents: Path | None) -> None:
    """Say what cannot be written, before anything is loaded or fetched.

    Raises:
        MediaError: a file cannot be written where it should go.
        RequestError: the video would replace what it is made from.
    """
    from kadr.media.writer import VideoWriter

    refuse_overwriting(request, output)
    size = request.size if isinstance(request.size, Size) else Size(2, 2)
    VideoWriter(output, size, request.fps or 24)  # refuses at birth what it could not write
    if latents is None:
        return
    if latents.suffix != ".safetensors":
        raise MediaError(f"{latents} does not end in .safetensors. Name it {latents.stem}.safetensors.")
    if not latents.parent.is_dir():
        raise MediaError(f"the folder {latents.parent} does not exist. Make it first, or choose another.")


def make(
    engine: Engine,
    request: Request,
    output: Path,
    *,
    latents: Path | None = None,
    as_json: bool = False,
    resume: bool = False,
) -> None:
    """Make the video and print its path, or all about it as JSON, on stdout. resume: as of `Engine.write`."""
    with _windows_told(output), shown() as watch:
        made = engine.write(request, output, watch=watch, planned=tell_plan, resume=resume)
    told = summary(engine, made)
    if latents is not None:
        save_latents(made, latents, told)
    say(f"{made.frames} frames of {made.size} at {made.fps:g} per second, made in {duration(made.seconds)}")
    print(json.dumps(told) if as_json else made.path)


@contextmanager
def _windows_told(output: Path) -> Iterator[None]:
    """Say what has been kept of a long video, if it is not finished."""
    try:
        yield
    except BaseException as error:
        from kadr.pipeline.longvideo.window_folder import kept_in  # loads torch

        kept = len(kept_in(window_folder_path(output)))
        if kept and not isinstance(error, RequestError):
            say(f"{kept} finished {'window is' if kept == 1 else 'windows are'} kept; --resume goes on with the video")
        raise


def tell_plan(plan: Plan) -> None:
    """Say what the run will take, and what is done about it."""
    say(f"plan: {plan.summary()}")
    for reason in plan.reasons():
        say(f"plan: {reason}")


def summary(engine: Engine, made: VideoFile) -> dict[str, Any]:
    """What --json prints."""
    return {
        "path": str(made.path),
        "size": str(made.size),
        "frames": made.frames,
        "fps": made.fps,
        "seconds": round(made.seconds, 3),
        "model": engine.name,
        "seed": made.request.seed,
        "request": made.request.to_json(),
    }


def save_latents(made: VideoFile, path: Path, told: dict[str, Any]) -> None:
    """Write the latents, float32 (128, f, h, w), under the name "latents", and the request as metadata."""
    from kadr.checkpoints.save import write_tensors

    metadata = {"kadr": json.dumps({key: told[key] for key in ("model", "request")})}
    write_tensors(path, {"latents": made.latents}, dtype=made.latents.dtype, metadata=metadata)
