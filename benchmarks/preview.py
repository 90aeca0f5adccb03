"""Measures what previews show and cost: `python -m benchmarks.preview`. Writes docs/performance.md.

The demo: the correlation of the preview of each step with what the VAE decodes from the same prediction, and with the
finished video. The shape of the released 2B model, with random weights of some blocks: a step of all 28 is what is not
a block, and 28 times the median block of the same run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from kadr import Engine, Progress, Recipe, Request
from kadr.bench.cases import DIT, Selection
from kadr.bench.machine import describe_machine
from kadr.bench.model_files import open_model_files
from kadr.bench.peak_memory import host_peak_bytes
from kadr.bench.text_report import format_bytes, format_seconds, machine_line
from kadr.kernels.cpu.malloc import tune_malloc
from kadr.models.transformer import TRANSFORMER_2B, TransformerBlock
from kadr.pipeline.generation import Generation
from kadr.pipeline.stages.preview import CELL, PreviewMap, open_preview_map
from kadr.shapes import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, LatentGrid
from tests import doc_tables
from train.scenes import held_out_captions

PAGE, MARK = doc_tables.DOCS / "performance.md", "python -m benchmarks.preview"
SEED = 78
SHOWN_STEPS = (1, 2, 4, 8, 12, 16, 20, 22, 23, 24)
DEMO_COLUMNS = ("step", "sigma", "with its own decode", "with the video", "worst video", "with the video, by cell")
COST_COLUMNS = ("", "a step", "a preview", "share", "fitting the map", "its memory")
RELEASED = Request("a fox in snow", size=(768, 512), frames=121, steps=3, guidance=1.0)
NUM_BLOCKS = 2


class RecordingMap(PreviewMap):
    """A map that remembers the latents (1, C, f, h, w) that it renders."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__(weights)
        self.latents: list[Tensor] = []

    def render(self, tokens: Tensor, grid: LatentGrid) -> np.ndarray:
        self.latents.append(tokens.float().T.reshape(1, -1, grid.frames, grid.height, grid.width))
        return super().render(tokens, grid)


@dataclass
class Steps:
    """Steps of a run: the preview uint8 (f, h, w, 3) and sigma of each, and seconds without and for the preview."""

    previews: list[np.ndarray] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    preview_seconds: list[float] = field(default_factory=list)
    _began: float = 0.0

    def watch(self, progress: Progress) -> None:
        now = time.perf_counter()
        if progress.sigma is not None:
            self.previews.append(progress.preview)
            self.sigmas.append(progress.sigma)
            self.seconds.append(now - self._began)
            self.preview_seconds.append(time.perf_counter() - now)
        self._began = time.perf_counter()


@dataclass(frozen=True)
class Cost:
    """Seconds of a step and of its preview; seconds and bytes of the fit."""

    name: str
    step: float
    preview: float
    fit: float
    fit_bytes: int | None

    def row(self) -> tuple[str, ...]:
        share = f"{100 * self.preview / self.step:.2g} %"
        times = [format_seconds(seconds) for seconds in (self.step, self.preview, self.fit)]
        return self.name, *times[:2], share, times[2], format_bytes(self.fit_bytes)


def small_frames(frames: np.ndarray) -> np.ndarray:
    """Returns the frames that a preview stands for, at its size: the first, then the fifth of each eight."""
    chosen = torch.tensor(frames[[0, *range(5, len(frames), TEMPORAL_COMPRESSION)]]).permute(0, 3, 1, 2).float()
    height, width = (side * CELL // SPATIAL_COMPRESSION for side in frames.shape[1:3])
    return adaptive_avg_pool2d(chosen, (height, width)).permute(0, 2, 3, 1).numpy()


def correlate(frames: np.ndarray, others: np.ndarray) -> float:
    """Returns Pearson's correlation over all pixels and channels."""
    return float(np.corrcoef(frames.ravel(), others.ravel())[0, 1])


def mean_by_cell(frames: np.ndarray) -> np.ndarray:
    """Returns the mean colour of each latent cell of previews or small frames (f, 8h, 8w, 3): float (f, h, w, 3)."""
    count, height, width, channels = frames.shape
    return frames.reshape(count, height // CELL, CELL, width // CELL, CELL, channels).mean((2, 4))


def run_steps(generation: Generation, steps: Steps, preview_map: PreviewMap) -> Tensor:
    """Denoises with previews by a map; returns the latents (1, C, f, h, w)."""
    stage = generation.denoise_stage
    generation.denoise_stage = replace(stage, preview_map=preview_map, watch=steps.watch)
    return generation.denoise()


def correlate_steps(engine: Engine, decoder: Engine, request: Request, weights: Tensor) -> tuple[Steps, np.ndarray]:
    """Makes a video. Returns its steps, and their correlations (S, 3) with their own decode and with the video.

    The third is that of the mean colour of each latent cell, with the video.
    """
    steps, recording = Steps(), RecordingMap(weights)
    with engine.start(request, stages=("text", "denoise")) as generation:
        latents = run_steps(generation, steps, recording)
    video = small_frames(decoder.decode(latents, request).numpy())
    own = (small_frames(decoder.decode(latents, request).numpy()) for latents in recording.latents)
    correlations = [
        (correlate(preview, decoded), correlate(preview, video), correlate(mean_by_cell(preview), mean_by_cell(video)))
        for preview, decoded in zip(steps.previews, own, strict=True)
    ]
    return steps, np.array(correlations)


def measure_demo(num_videos: int, scratch: Path) -> tuple[list[tuple[str, ...]], Cost]:
    """Returns the rows of `DEMO_COLUMNS`, and the cost."""
    engine, decoder = (Engine.open("demo", device="cpu", dtype="float32", prompt_cache=scratch) for _ in range(2))
    weights, fit, fit_bytes = fit_map(engine)
    engine.denoise(Request("a red circle", steps=2))  # one-time setup is not timed
    runs = [
        correlate_steps(engine, decoder, Request(caption, seed=seed), weights)
        for seed, (caption, _) in enumerate(held_out_captions(num_videos, SEED))
    ]
    correlations = np.stack([each for _, each in runs])  # (videos, S, 3)
    own, video, by_cell = correlations.mean(0).T
    columns = own, video, correlations[..., 1].min(0), by_cell
    rows = [
        (str(step), f"{runs[0][0].sigmas[step - 1]:.2f}", *(f"{column[step - 1]:.2f}" for column in columns))
        for step in SHOWN_STEPS
    ]
    seconds = _median_seconds([steps for steps, _ in runs])
    return rows, Cost("demo, 128x128x25", *seconds, fit, fit_bytes)


def _median_seconds(runs: Sequence[Steps]) -> tuple[float, float]:
    """Returns the median seconds of a step and of a preview, without the first of a run, which sets things up."""
    return (
        median(seconds for steps in runs for seconds in steps.seconds[1:]),
        median(seconds for steps in runs for seconds in steps.preview_seconds[1:]),
    )


def fit_map(engine: Engine) -> tuple[Tensor, float, int | None]:
    """Returns the weights of a map that is fitted now, and the seconds and bytes that it takes."""
    fitted: list[Any] = []

    def fit() -> None:
        began = time.perf_counter()
        with engine.start(RELEASED, stages=("text",)) as generation:
            preview_map = open_preview_map(generation.modules.loader, False)
        fitted.extend((preview_map.weights, time.perf_counter() - began))

    peak = host_peak_bytes(fit)
    return fitted[0], fitted[1], peak


@contextmanager
def time_blocks() -> Iterator[list[float]]:
    """Yields the seconds of each call of a transformer block inside the `with` block."""
    seconds, began = list[float](), [0.0]

    def begin(module: nn.Module, args: Any) -> None:
        if isinstance(module, TransformerBlock):
            began[0] = time.perf_counter()

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, TransformerBlock):
            seconds.append(time.perf_counter() - began[0])

    hooks = register_module_forward_pre_hook(begin), register_module_forward_hook(end)
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def measure_released(models_folder: Path | None, scratch: Path) -> Cost:
    """Measures the shape of the released 2B model at 768x512x121, with random weights."""
    selection, steps = Selection(models=("2b",), stages=(DIT,), num_layers=NUM_BLOCKS), Steps()
    with open_model_files("2b", selection, models_folder) as files:
        engine = Engine.open(
            files.path, text_encoder=files.text_encoder_folder, recipe=Recipe(), device="cpu", prompt_cache=scratch
        )
        weights, fit, fit_bytes = fit_map(engine)
        with engine.start(RELEASED, stages=("text", "denoise")) as generation, time_blocks() as block_seconds:
            run_steps(generation, steps, PreviewMap(weights))
    step, preview = _median_seconds([steps])
    whole = step + (TRANSFORMER_2B.num_layers - NUM_BLOCKS) * median(block_seconds)
    return Cost("2B, 768x512x121", whole, preview, fit, fit_bytes)


def format_section(
    machine: Mapping[str, Any], rows: Sequence[Sequence[str]], costs: Sequence[Cost], num_videos: int
) -> Iterator[str]:
    load = "" if machine["load"] is None else f"; the load before was {machine['load']:.1f}"
    yield f"\n{machine_line(machine)}{load}.\n"
    yield f"Correlations of the preview of a step, the mean of {num_videos} videos of the demo:\n"
    yield doc_tables.markdown_table(DEMO_COLUMNS, rows)
    yield "Medians of a run:\n"
    yield doc_tables.markdown_table(COST_COLUMNS, (cost.row() for cost in costs))


def main() -> None:
    parser = argparse.ArgumentParser(prog=MARK, description=__doc__)
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--model-folder", type=Path, help="keeps the random model, 1 GB")
    arguments = parser.parse_args()
    tune_malloc()
    machine = describe_machine(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        rows, demo = measure_demo(arguments.videos, Path(name))
        released = measure_released(arguments.model_folder, Path(name))
    section = "\n".join(format_section(machine, rows, (demo, released), arguments.videos))
    print(section)
    doc_tables.write_table(PAGE, MARK, section)


if __name__ == "__main__":
    main()
