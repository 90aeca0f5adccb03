"""A minute of video: overlaps, colours, memory, and a resume after a kill: `python -m benchmarks.long_video`.

Runs the demo through the command line, each time in a process of its own: 20 s; 60 s, whose memory is compared with
that of 20 s; and 60 s again, killed with SIGKILL in its third window and continued with --resume. Writes
benchmarks/results/long-cpu-demo.json and the table of docs/guides/long-video.md.

The change between two frames is the mean absolute difference of their pixels, 0 to 255. Frames come from the decoder,
decoded again from the saved latents. The frames of the mp4 are measured separately, because each key frame of H.264,
one in 250, is a small jump of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from kadr import Engine, Request
from kadr.bench.machine import describe_machine
from kadr.bench.peak_memory import process_peak_bytes
from kadr.media.clip import read_metadata, read_video
from kadr.pipeline.longvideo.window_folder import finished_windows
from kadr.request.windows import Span, Windows, window_folder_path
from tests import doc_tables

RESULTS = Path(__file__).parent / "results"
PAGE, NAME = doc_tables.DOCS / "guides" / "long-video.md", "python -m benchmarks.long_video"
FPS, WINDOW_OPTIONS = 24, Windows(frames=25, overlap=16)  # the length the demo was trained on; its default overlap
RIGHTWARD, LEFTWARD = (f"a red circle moving {direction} on a black background" for direction in ("right", "left"))
STILL = "a red circle standing still on a black background"
WINDOWS_PER_DIRECTION = 2  # the circle crosses the frame in that time
OVERLAP_MARGIN = 2  # frames
MIN_SHAPE_DISTANCE = 0.8  # share of the largest colour distance from the background; nearer pixels are edges


@dataclass(frozen=True)
class ProcessResult:
    """Measurements of a process: seconds, peak bytes, and resident bytes each time a window was finished."""

    seconds: float
    peak_bytes: int
    resident_bytes: list[int]


def prompts(scene: str, seconds: float) -> list[str]:
    """Returns one prompt for each window, or one for all."""
    if scene == "still":
        return [STILL]
    count = len(WINDOW_OPTIONS.spans(round(seconds * FPS)))
    return [(RIGHTWARD, LEFTWARD)[index // WINDOWS_PER_DIRECTION % 2] for index in range(count)]


def command(scene: str, seconds: float, video_path: Path, *extra_flags: str) -> list[str]:
    flags = [word for prompt in prompts(scene, seconds) for word in ("--prompt", prompt)]
    flags += ["--window", str(WINDOW_OPTIONS.frames), "--seconds", f"{seconds:g}", "--device", "cpu", "--seed", "1"]
    flags += ["--output", str(video_path), "--save-latents", str(_latents_path(video_path))]
    return [sys.executable, "-m", "kadr", "generate", *flags, *extra_flags]


def run_process(command: Sequence[str], video_path: Path, *, kill_in_window: int | None = None) -> ProcessResult:
    """Runs a command to its end, or kills it in the middle of a window, counted from 1."""
    began, peak_bytes, resident_bytes, finished = time.monotonic(), 0, list[int](), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        peak_bytes = max(peak_bytes, process_peak_bytes(process.pid) or 0)
        if (count := len(finished_windows(window_folder_path(video_path)))) > finished:
            finished = count
            resident_bytes.append(_resident_bytes(process.pid))
            if kill_in_window is not None and finished == kill_in_window - 1:
                time.sleep(0.3)
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.02)
    expected = 0 if kill_in_window is None else -signal.SIGKILL
    if process.returncode != expected:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return ProcessResult(time.monotonic() - began, peak_bytes, resident_bytes)


def _resident_bytes(pid: int) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def frame_changes(frames: np.ndarray) -> np.ndarray:
    """Returns the change between each frame and the next, (F - 1)."""
    return np.array([np.abs(frame.astype(np.int16) - following).mean() for frame, following in pairwise(frames)])


def overlap_changes(spans: Sequence[Span], overlap: int) -> list[int]:
    """Returns the indices of the changes at both ends of each blended latent, and `OVERLAP_MARGIN` before and after.

    The decoder sees a latent's neighbours, so a jump need not fall on its edge.
    """
    edges = [8 * latent for span in spans[1:] for latent in range(span.start, span.start + overlap)]
    return sorted({edge + offset for edge in edges for offset in range(-OVERLAP_MARGIN, OVERLAP_MARGIN + 1)})


def mean_colours(frames: np.ndarray) -> dict[str, list[float]]:
    """Returns the mean colours (RGB, 0 to 255) of the whole frame, the background and the shape over some frames."""
    pixels = frames.reshape(-1, 3).astype(np.float32)
    background = np.median(pixels, axis=0)
    distance = np.linalg.norm(pixels - background, axis=1)
    largest = np.percentile(distance, 99.5)
    regions = {
        "frame": pixels,
        "background": pixels[distance < 0.1 * largest],
        "shape": pixels[distance > MIN_SHAPE_DISTANCE * largest],
    }
    return {name: region.mean(axis=0).tolist() for name, region in regions.items()}


def colour_distances(first: dict[str, list[float]], second: dict[str, list[float]]) -> dict[str, float]:
    """Returns the largest difference of a colour channel for each region."""
    return {name: float(np.abs(np.subtract(first[name], second[name])).max()) for name in first}


def decode_latents_file(video_path: Path) -> np.ndarray:
    """Decodes the frames of a video again, from its saved latents."""
    request = Request.from_json(read_metadata(video_path)["request"])
    latents = load_file(_latents_path(video_path))["latents"]
    return Engine.open("demo", device="cpu").decode(latents[None], request).numpy()


def _latents_path(video_path: Path) -> Path:
    return video_path.with_suffix(".safetensors")


def measure_video(video_path: Path) -> dict[str, Any]:
    """Measures changes and colours of a video."""
    frames = decode_latents_file(video_path)
    mp4_changes = frame_changes(read_video(video_path).frames)
    spans, overlap = WINDOW_OPTIONS.spans(len(frames)), WINDOW_OPTIONS.latent_frames[1]
    changes = frame_changes(frames)
    median, length = float(np.median(changes)), spans[0].frames
    first_colours, last_colours = mean_colours(frames[:length]), mean_colours(frames[-length:])
    return {
        "frames": len(frames),
        "windows": len(spans),
        "median_change": median,
        "largest_change_at_overlap": float(changes[overlap_changes(spans, overlap)].max()) / median,
        "largest_change_anywhere": float(changes.max()) / median,
        "largest_change_in_the_mp4": float(mp4_changes.max() / np.median(mp4_changes)),
        "colours_first": first_colours,
        "colours_last": last_colours,
        "colour_distance": colour_distances(first_colours, last_colours),
        "farthest_window": _largest_window_distance(frames, spans),
    }


def _largest_window_distance(frames: np.ndarray, spans: Sequence[Span]) -> float:
    """Returns the largest colour distance of any window from the first, over all regions and channels."""
    first = mean_colours(frames[: spans[0].frames])
    starts = [span.first_frame for span in spans[1:]]
    return max(
        max(colour_distances(first, mean_colours(frames[start : start + spans[0].frames])).values()) for start in starts
    )


def write_contact_sheet(video_path: Path, path: Path, count: int = 60, row: int = 12) -> None:
    """Writes an image of evenly spaced frames."""
    frames = read_video(video_path).frames
    selected = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    Image.fromarray(
        np.concatenate([np.concatenate(list(selected[i : i + row]), 1) for i in range(0, count, row)])
    ).save(path)


def table_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the rows of the table: quantity, moving scene, still scene."""

    def row(quantity: str, cell: Callable[[dict[str, Any]], str]) -> tuple[str, str, str]:
        moving, still = (cell(result["scenes"][scene]) for scene in ("moving", "still"))
        return quantity, moving, still

    return [
        row("frames, windows", lambda scene: f"{scene['frames']}, {scene['windows']}"),
        row("median change from frame to frame", lambda scene: f"{scene['median_change']:.2f}"),
        row("largest change at an overlap, over the median", lambda scene: f"{scene['largest_change_at_overlap']:.2f}"),
        row("largest change anywhere, over the median", lambda scene: f"{scene['largest_change_anywhere']:.2f}"),
        row("largest change in the mp4, over its median", lambda scene: f"{scene['largest_change_in_the_mp4']:.2f}"),
        row("shape, last window from the first", lambda scene: f"{scene['colour_distance']['shape']:.1f}"),
        row("background, last window from the first", lambda scene: f"{scene['colour_distance']['background']:.1f}"),
        row("any window from the first", lambda scene: f"{scene['farthest_window']:.1f}"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_video", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--shorter", type=float, default=20.0, help="length of the video whose memory is compared")
    parser.add_argument("--steps", type=int, help="steps of each window; by default those of the recipe")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the videos and contact sheets in this folder")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    extra_flags = [] if options.steps is None else ["--steps", str(options.steps)]
    with TemporaryDirectory() as temporary:
        home = options.keep or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        clips = {name: home / f"{name}.mp4" for name in ("short", "moving", "still", "killed")}
        short = run_process(command("moving", options.shorter, clips["short"], *extra_flags), clips["short"])
        long = run_process(command("moving", options.seconds, clips["moving"], *extra_flags), clips["moving"])
        run_process(command("still", options.seconds, clips["still"], *extra_flags), clips["still"])
        killed = command("moving", options.seconds, clips["killed"], *extra_flags)
        run_process(killed, clips["killed"], kill_in_window=3)
        finished = len(finished_windows(window_folder_path(clips["killed"])))
        run_process([*killed, "--resume"], clips["killed"])
        resumed, uninterrupted = (read_video(clips[name]).frames for name in ("killed", "moving"))
        result: dict[str, Any] = {
            "machine": describe_machine(torch.device("cpu")),
            "seconds": options.seconds,
            "steps": options.steps,
            "scenes": {scene: measure_video(clips[scene]) for scene in ("moving", "still")},
            "seconds_taken": {"short": short.seconds, "long": long.seconds},
            "memory": {
                "short": {"seconds": options.shorter, "peak_bytes": short.peak_bytes},
                "long": {
                    "seconds": options.seconds,
                    "peak_bytes": long.peak_bytes,
                    "resident_bytes_per_window": long.resident_bytes,
                },
            },
            "killed": {"finished_windows": finished, "frames_identical": bool((resumed == uninterrupted).all())},
        }
        for scene in ("moving", "still"):
            write_contact_sheet(clips[scene], home / f"{scene}.png")
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "long-cpu-demo.json"
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if options.results == RESULTS:
        doc_tables.write_table(
            PAGE,
            NAME,
            doc_tables.markdown_table((f"{options.seconds:g} s of the demo", "moving", "still"), table_rows(result)),
        )
    print(
        *(": ".join([quantity, ", ".join(cells)]) for quantity, *cells in table_rows(result)),
        result["killed"],
        sep="\n",
    )
    print({name: run["peak_bytes"] for name, run in result["memory"].items()}, result["seconds_taken"], path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
