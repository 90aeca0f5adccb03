"""Measures how long a cancelled generation takes to stop: `python -m benchmarks.cancel --moments 60`.

Cancels from another thread at random moments of every stage of every mode, on the demo and on a model of the 2B's width
with few blocks. Prints a markdown table, in which the longest wait should be at most a second or one layer, whichever
is longer. A layer is what lies between two looks at the token; the longest of an uncancelled generation is shown.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from kadr import Condition, Control, Engine, Progress, Request, Size
from kadr.bench.cases import DEMO, Selection
from kadr.bench.model_files import open_model_files
from kadr.cancellation import CancelToken
from kadr.errors import Cancelled
from kadr.kernels.cpu.malloc import tune_malloc
from kadr.media.writer import VideoWriter
from kadr.request.windows import Windows
from kadr.sampling.settings import Pass

PROMPT = "a red circle moving right on a black background"
PREPARE = "plan and load"  # before the first stage reports
DEMO_SIZE, WIDE_SIZE = Size(256, 256), Size(1024, 1024)


@dataclass(frozen=True)
class Mode:
    """One kind of generation.

    Args:
        model: "demo" or "2b".
        options: of `Engine.open`.
    """

    name: str
    model: str
    request: Request
    options: dict[str, Any]


class TimedToken(CancelToken):
    """A token that knows when it was cancelled, in which stage, and the longest time between two looks at it.

    Attributes:
        stage: the stage that runs.
        cancelled_at: seconds of the monotonic clock; None before.
        cancelled_in: the stage it was cancelled in.
        longest_gap: stage -> seconds between two looks.
    """

    def __init__(self) -> None:
        self.stage, self.cancelled_in, self.cancelled_at = PREPARE, PREPARE, float("nan")
        self.longest_gap: dict[str, float] = defaultdict(float)
        self._looked_at, self._flag = time.monotonic(), False
        super().__init__()

    @property
    def is_cancelled(self) -> bool:
        now = time.monotonic()
        self.longest_gap[self.stage] = max(self.longest_gap[self.stage], now - self._looked_at)
        self._looked_at = now
        return self._flag

    @is_cancelled.setter
    def is_cancelled(self, value: bool) -> None:
        if value and not self._flag:
            self.cancelled_at, self.cancelled_in = time.monotonic(), self.stage
        self._flag = value

    def watch(self, progress: Progress) -> None:
        """Notes the stage."""
        self.stage = progress.stage


@dataclass
class StageTimes:
    """Seconds to stop in one stage, and the longest time between two looks at the token without cancelling."""

    stops: list[float]
    longest_gap: float


def measure_mode(
    mode: Mode, open_engine: Callable[[], Engine], folder: Path, moments: int, draw: random.Random
) -> dict[str, StageTimes]:
    """Cancels `moments` generations, as many in each stage, each of an engine that has loaded nothing yet.

    Raises:
        RuntimeError: a cancelled generation left a file that it should not.
    """
    output = folder / "out.mp4"
    durations, gaps = _time_stages(mode, open_engine(), output)
    output.unlink()
    results = {stage: StageTimes([], gaps.get(stage, 0.0)) for stage in durations}
    for stage, duration in durations.items():
        for _ in range(max(1, moments // len(durations))):
            token = TimedToken()
            seconds = _cancel_in(stage, draw.uniform(0.0, duration), mode, open_engine(), output, token)
            if seconds is not None:
                results[token.cancelled_in].stops.append(seconds)
            _check_folder(mode, stage, folder)
    return results


def _time_stages(mode: Mode, engine: Engine, output: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the seconds of each stage of a whole video, and the longest time between two looks in each."""
    token, durations, began = TimedToken(), {PREPARE: 0.0}, time.monotonic()

    def watch(progress: Progress) -> None:
        nonlocal began
        now = time.monotonic()
        durations[token.stage] += now - began
        durations.setdefault(progress.stage, 0.0)
        began = now
        token.watch(progress)

    engine.write(mode.request, output, watch=watch, cancel=token)
    return durations, token.longest_gap


def _cancel_in(stage: str, delay: float, mode: Mode, engine: Engine, output: Path, token: TimedToken) -> float | None:
    """Cancels `delay` seconds after a stage has begun; returns the seconds to stop, None if the video was finished."""
    timer = threading.Timer(delay, token.cancel)

    def watch(progress: Progress) -> None:
        token.watch(progress)
        if progress.stage == stage and timer.ident is None:
            timer.start()

    if stage == PREPARE:
        timer.start()
    try:
        engine.write(mode.request, output, watch=watch, cancel=token)
    except Cancelled:
        return time.monotonic() - token.cancelled_at
    finally:
        timer.cancel()
    output.unlink()
    return None


def _check_folder(mode: Mode, stage: str, folder: Path) -> None:
    """Refuses what a cancelled generation left, except finished windows, which it deletes."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if mode.request.windows is None or path.suffix in (".part", ".mp4"):
            raise RuntimeError(f"{mode.name}: cancelled in {stage}, the generation left {path.name}")
        path.rmdir() if path.is_dir() else path.unlink()


def demo_modes(inputs: Path) -> list[Mode]:
    """Returns every kind of generation, on the demo."""
    clip = inputs / "clip.mp4"
    with VideoWriter(clip, DEMO_SIZE, 24) as writer:
        writer.write(
            np.random.default_rng(0).integers(0, 256, (25, DEMO_SIZE.height, DEMO_SIZE.width, 3), dtype=np.uint8)
        )
    base = Request(prompt=PROMPT, size=DEMO_SIZE, frames=25, seed=0, sigmas=(1.0, 0.7, 0.4), multi_scale=False)
    two_passes = {"multi_scale": True, "second_pass": Pass(sigmas=(0.8, 0.4)), "downscale_factor": 0.5}
    lora = {"loras": ["demo-ic-lora-canny"]}
    return [
        Mode("text to video", "demo", base, {}),
        Mode("clip as a condition", "demo", replace(base, conditions=(Condition(str(clip)),)), {}),
        Mode("two passes", "demo", replace(base, **two_passes), {"upscaler": "demo-upscaler"}),
        Mode("windows", "demo", replace(base, frames=73, windows=Windows(frames=25, overlap=16)), {}),
        Mode("control", "demo", replace(base, controls=(Control(str(clip), kind="canny"),)), lora),
        Mode("quantized to Q3_K", "demo", base, {"quant": "Q3_K"}),
    ]


def wide_modes() -> list[Mode]:
    """Returns generations at 1024x1024 of a model as wide as the 2B."""
    base = Request(prompt=PROMPT, size=WIDE_SIZE, frames=9, seed=0, sigmas=(1.0, 0.7), multi_scale=False)
    return [Mode("text to video", "2b", base, {}), Mode("quantized to Q4_K", "2b", base, {"quant": "Q4_K"})]


@contextmanager
def engine_opener(mode: Mode, num_layers: int, models_folder: Path | None) -> Iterator[Callable[[], Engine]]:
    """Yields a function that opens a mode's engine, without a prompt cache, so that every prompt is encoded."""
    selection = Selection(models=(mode.model,), num_layers=None if mode.model == DEMO else num_layers)
    with open_model_files(mode.model, selection, models_folder) as files:
        folder = None if mode.model == DEMO else files.text_encoder_folder
        yield partial(Engine.open, files.path, text_encoder=folder, prompt_cache=False, **mode.options)


def format_table(results: Sequence[tuple[Mode, str, StageTimes]]) -> str:
    """Formats the results as a markdown table."""
    lines = [
        "| model | mode | stage | cancelled | mean s | max s | longest layer s |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for mode, stage, times in results:
        mean, longest = (f"{f(times.stops):.3f}" if times.stops else "" for f in (fmean, max))
        count, size = len(times.stops), f"{mode.model} {mode.request.size}"
        lines.append(f"| {size} | {mode.name} | {stage} | {count} | {mean} | {longest} | {times.longest_gap:.3f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=60, help="generations that are cancelled, in each mode")
    parser.add_argument("--models", nargs="+", default=["demo", "2b"], choices=["demo", "2b"])
    parser.add_argument("--num-layers", type=int, default=2, help="blocks of the wide model")
    parser.add_argument("--models-folder", type=Path, help="keeps the random model")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    tune_malloc()
    draw, results = random.Random(flags.seed), list[tuple[Mode, str, StageTimes]]()
    make_modes: dict[str, Callable[[Path], list[Mode]]] = {"demo": demo_modes, "2b": lambda _: wide_modes()}
    for model in flags.models:
        with ExitStack() as stack:
            inputs, folder = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
            for mode in make_modes[model](inputs):
                with engine_opener(mode, flags.num_layers, flags.models_folder) as open_engine:
                    times = measure_mode(mode, open_engine, folder, flags.moments, draw)
                results += [(mode, stage, stage_times) for stage, stage_times in times.items()]
                print(f"{mode.model}, {mode.name}: done", file=sys.stderr)
    print(format_table(results))


if __name__ == "__main__":
    main()
