"""A minute of video: seams, colours, memory, and a kill on the way: `python -m benchmarks.long_video`.

The demo, through the command line, each run in a process of its own: 20 s; 60 s, whose memory is compared with that of
20 s; and 60 s once more, killed with SIGKILL in its third window and gone on with by --resume. Writes
benchmarks/results/long-cpu-demo.json and the table of docs/guides/long-video.md.

The change between two frames is the mean absolute difference of their pixels, 0 to 255. Frames are those that the
decoder gives, made again of the latents that are saved; those of the mp4 are judged beside them, in which each key
frame of H.264, one in 250, is a small jump of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
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
FPS, WINDOW_OPTIONS = 24, Windows(frames=25, overlap=16)  # what the demo was trained on; the usual overlap for it
RIGHTWARD, LEFTWARD = (f"a red circle moving {way} on a black background" for way in ("right", "left"))
STILL = "a red circle standing still on a black background"
WINDOWS_PER_DIRECTION = 2  # windows until it turns round: it crosses the picture in that time
SEAM_MARGIN = 2  # frames
INK_SHARE = 0.8  # of the strongest distance from the background: what is nearer is edge


@dataclass(frozen=True)
class ProcessResult:
    """A run that ended: seconds, bytes at its highest mark, and of bytes resident whenever a window was finished."""

    seconds: float
    peak_bytes: int
    resident_bytes: list[int]


def prompts(scene: str, seconds: float) -> list[str]:
    """One for each window, or one for all."""
    if scene == "still":
        return [STILL]
    count = len(WINDOW_OPTIONS.spans(round(seconds * FPS)))
    return [(RIGHTWARD, LEFTWARD)[number // WINDOWS_PER_DIRECTION % 2] for number in range(count)]


def command(scene: str, seconds: float, video_path: Path, *extra_flags: str) -> list[str]:
    words = [word for prompt in prompts(scene, seconds) for word in ("--prompt", prompt)]
    words += ["--window", str(WINDOW_OPTIONS.frames), "--seconds", f"{seconds:g}", "--device", "cpu", "--seed", "1"]
    words += ["--output", str(video_path), "--save-latents", str(_latents_path(video_path))]
    return [sys.executable, "-m", "kadr", "generate", *words, *extra_flags]


def run_process(command: Sequence[str], video_path: Path, *, kill_in_window: int | None = None) -> ProcessResult:
    """Run until it ends, or until it is in the middle of a window, from 1."""
    began, peak, resident, done = time.monotonic(), 0, list[int](), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, process_peak_bytes(process.pid) or 0)
        if (count := len(finished_windows(window_folder_path(video_path)))) > done:
            done = count
            resident.append(_resident(process.pid))
            if kill_in_window is not None and done == kill_in_window - 1:
                time.sleep(0.3)
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.02)
    expected = 0 if kill_in_window is None else -signal.SIGKILL
    if process.returncode != expected:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return ProcessResult(time.monotonic() - began, peak, resident)


def _resident(pid: int) -> int:
    pages_of_memory = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages_of_memory) * os.sysconf("SC_PAGE_SIZE")


def frame_changes(frames: np.ndarray) -> np.ndarray:
    """Between each frame and the next, (F - 1)."""
    return np.array([np.abs(one.astype(np.int16) - other).mean() for one, other in pairwise(frames)])


def overlap_changes(spans: Sequence[Span], overlap: int) -> list[int]:
    """The changes where the share of a window in the latents changes, at both ends of each latent of a seam, and the
    `SEAM_MARGIN` before and after each: the decoder sees a latent's neighbours, so a jump need not fall on its edge."""
    edges = [8 * latent for span in spans[1:] for latent in range(span.start, span.start + overlap)]
    return sorted({edge + off for edge in edges for off in range(-SEAM_MARGIN, SEAM_MARGIN + 1)})


def mean_colours(frames: np.ndarray) -> dict[str, list[float]]:
    """Mean colours, RGB of 0 to 255, of some frames: of the whole picture, the background and the shape."""
    pixels = frames.reshape(-1, 3).astype(np.float32)
    paper = np.median(pixels, axis=0)
    away = np.linalg.norm(pixels - paper, axis=1)
    strongest = np.percentile(away, 99.5)
    parts = {
        "picture": pixels,
        "background": pixels[away < 0.1 * strongest],
        "shape": pixels[away > INK_SHARE * strongest],
    }
    return {name: part.mean(axis=0).tolist() for name, part in parts.items()}


def colour_distances(first: dict[str, list[float]], second: dict[str, list[float]]) -> dict[str, float]:
    """The largest distance of a channel, for each."""
    return {name: float(np.abs(np.subtract(first[name], second[name])).max()) for name in first}


def decode_latents_file(video_path: Path) -> np.ndarray:
    """The frames of a video before they were written, from its latents."""
    request = Request.from_json(read_metadata(video_path)["request"])
    latents = load_file(_latents_path(video_path))["latents"]
    return Engine.open("demo", device="cpu").decode(latents[None], request).numpy()


def _latents_path(video_path: Path) -> Path:
    return video_path.with_suffix(".safetensors")


def measure_video(video_path: Path) -> dict[str, Any]:
    """Seams and colours of a video."""
    frames = decode_latents_file(video_path)
    written = frame_changes(read_video(video_path).frames)
    spans, overlap = WINDOW_OPTIONS.spans(len(frames)), WINDOW_OPTIONS.latent_frames[1]
    moved = frame_changes(frames)
    usual, length = float(np.median(moved)), spans[0].frames
    return {
        "frames": len(frames),
        "windows": len(spans),
        "median_change": usual,
        "largest_change_at_a_seam": float(moved[overlap_changes(spans, overlap)].max()) / usual,
        "largest_change_anywhere": float(moved.max()) / usual,
        "largest_change_in_the_mp4": float(written.max() / np.median(written)),
        "colours_first": mean_colours(frames[:length]),
        "colours_last": mean_colours(frames[-length:]),
        "colours_apart": colour_distances(mean_colours(frames[:length]), mean_colours(frames[-length:])),
        "farthest_window": _largest_window_distance(frames, spans),
    }


def _largest_window_distance(frames: np.ndarray, spans: Sequence[Span]) -> float:
    """How far any window's colours are from the first one's, of all parts and channels."""
    first = mean_colours(frames[: spans[0].frames])
    starts = [span.first_frame for span in spans[1:]]
    return max(
        max(colour_distances(first, mean_colours(frames[start : start + spans[0].frames])).values()) for start in starts
    )


def write_contact_sheet(video_path: Path, path: Path, count: int = 60, row: int = 12) -> None:
    """A picture of frames at even distances."""
    frames = read_video(video_path).frames
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    Image.fromarray(np.concatenate([np.concatenate(list(chosen[i : i + row]), 1) for i in range(0, count, row)])).save(
        path
    )


def table_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Of the table: what, and for the moving and the still scene."""

    def both(what: str, tell: Any) -> tuple[str, str, str]:
        return what, *(tell(result["scenes"][scene]) for scene in ("moving", "still"))

    return [
        both("frames, windows", lambda of: f"{of['frames']}, {of['windows']}"),
        both("median change from frame to frame", lambda of: f"{of['median_change']:.2f}"),
        both("largest change at a seam, of the median", lambda of: f"{of['largest_change_at_a_seam']:.2f}"),
        both("largest change anywhere, of the median", lambda of: f"{of['largest_change_anywhere']:.2f}"),
        both("largest change anywhere in the mp4, of its median", lambda of: f"{of['largest_change_in_the_mp4']:.2f}"),
        both("shape, last window from the first", lambda of: f"{of['colours_apart']['shape']:.1f}"),
        both("background, last window from the first", lambda of: f"{of['colours_apart']['background']:.1f}"),
        both("any window from the first", lambda of: f"{of['farthest_window']:.1f}"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_video", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--shorter", type=float, default=20.0, help="whose memory the other's is compared with")
    parser.add_argument("--steps", type=int, help="else those of the recipe")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the videos and sheets of frames there")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    more = [] if asked.steps is None else ["--steps", str(asked.steps)]
    with TemporaryDirectory() as temporary:
        home = asked.keep or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        clips = {name: home / f"{name}.mp4" for name in ("short", "moving", "still", "killed")}
        short = run_process(command("moving", asked.shorter, clips["short"], *more), clips["short"])
        long = run_process(command("moving", asked.seconds, clips["moving"], *more), clips["moving"])
        run_process(command("still", asked.seconds, clips["still"], *more), clips["still"])
        killed = command("moving", asked.seconds, clips["killed"], *more)
        run_process(killed, clips["killed"], kill_in_window=3)
        finished = len(finished_windows(window_folder_path(clips["killed"])))
        run_process([*killed, "--resume"], clips["killed"])
        own, others = (read_video(clips[name]).frames for name in ("killed", "moving"))
        made: dict[str, Any] = {
            "machine": describe_machine(torch.device("cpu")),
            "seconds": asked.seconds,
            "steps": asked.steps,
            "scenes": {scene: measure_video(clips[scene]) for scene in ("moving", "still")},
            "took": {"short": short.seconds, "long": long.seconds},
            "memory": {
                "short": {"seconds": asked.shorter, "peak": short.peak_bytes},
                "long": {"seconds": asked.seconds, "peak": long.peak_bytes, "after_each_window": long.resident_bytes},
            },
            "killed": {"finished_windows": finished, "frames_are_the_same": bool((own == others).all())},
        }
        for scene in ("moving", "still"):
            write_contact_sheet(clips[scene], home / f"{scene}.png")
    asked.results.mkdir(parents=True, exist_ok=True)
    path = asked.results / "long-cpu-demo.json"
    path.write_text(json.dumps(made, indent=1) + "\n", "utf-8")
    if asked.results == RESULTS:
        doc_tables.write_table(
            PAGE,
            NAME,
            doc_tables.markdown_table((f"{asked.seconds:g} s of the demo", "moving", "still"), table_rows(made)),
        )
    print(*(": ".join([what, ", ".join(cells)]) for what, *cells in table_rows(made)), made["killed"], sep="\n")
    print({name: each["peak"] for name, each in made["memory"].items()}, made["took"], path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
