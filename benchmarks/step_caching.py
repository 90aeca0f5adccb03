"""Measures what step caching saves and costs: `python -m benchmarks.step_caching`. Writes docs/guides/step-caching.md.

The demo's own long recipe, the same captions and seeds with and without a cache. Every round makes all videos of one
seed, one cache after the other, so that other load on the machine affects all caches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch

from kadr import Engine, Request, StepCache
from kadr.kernels.cpu.malloc import tune_malloc
from tests import doc_tables
from train.evaluate import psnr
from train.judge import name_scene
from train.scenes import held_out_captions

PAGE = doc_tables.DOCS / "guides" / "step-caching.md"
BEGIN, END = "<!-- step caching: begin -->\n", "<!-- step caching: end -->\n"
SEED = 77
STEP_CACHES: Mapping[str, StepCache | None] = {
    "none": None,
    **{f"first-block {x}": StepCache("first-block", threshold=x) for x in (0.04, 0.08, 0.15)},
    **{f"taylor {n}": StepCache("taylor", interval=n) for n in (2, 3, 4)},
}


@dataclass
class CacheResult:
    """Results of one cache, a number per video: seconds of denoising, block calls, dB, matching properties of four."""

    seconds: list[float] = field(default_factory=list)
    block_calls: list[int] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    matched_properties: list[int] = field(default_factory=list)


@contextmanager
def count_block_calls(engine: Engine) -> Iterator[list[int]]:
    """Counts calls of transformer blocks inside the `with` block."""
    calls = [0]
    with engine.start(Request(prompt="a red circle")) as generation, generation.modules.transformer() as transformer:
        hooks = [
            block.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1)) for block in transformer.blocks
        ]
    yield calls
    for hook in hooks:
        hook.remove()


def measure(videos: int, steps: int) -> dict[str, CacheResult]:
    """Measures all caches in turn, for each of the videos."""
    results = {name: CacheResult() for name in STEP_CACHES}
    # An engine that only denoises keeps its transformer.
    engine, decoder = (Engine.open("demo", device="cpu", dtype="float32") for _ in range(2))
    engine.denoise(Request(prompt="a red circle", steps=2))  # one-time setup is not timed
    for seed, (caption, scene) in enumerate(held_out_captions(videos, SEED)):
        reference: np.ndarray | None = None
        for name, cache in STEP_CACHES.items():
            request, result = Request(prompt=caption, seed=seed, steps=steps, cache=cache), results[name]
            with count_block_calls(engine) as calls:
                start = time.perf_counter()
                latents = engine.denoise(request)
                result.seconds.append(time.perf_counter() - start)
            frames = decoder.decode(latents, request).numpy()
            reference = frames if reference is None else reference
            result.block_calls.append(calls[0])
            result.psnr.append(psnr(frames, reference))
            result.matched_properties.append(
                sum(actual == wanted for actual, wanted in zip(name_scene(frames), scene.key, strict=True))
            )
    return results


def table_rows(results: Mapping[str, CacheResult]) -> Iterator[Sequence[str]]:
    baseline = results["none"]
    for name, result in results.items():
        ratios = [without / cached for without, cached in zip(baseline.seconds, result.seconds, strict=True)]
        skipped = 1 - sum(result.block_calls) / sum(baseline.block_calls)
        quality = ("", "") if result is baseline else (f"{np.mean(result.psnr):.1f}", f"{min(result.psnr):.1f}")
        yield (
            name,
            f"{skipped:.0%}",
            f"{median(ratios):.2f}x",
            *quality,
            f"{np.mean(result.matched_properties) / 4:.0%}",
        )


def format_section(results: Mapping[str, CacheResult], videos: int, steps: int) -> str:
    head = ("cache", "blocks skipped", "denoising, faster", "PSNR, mean", "worst", "prompt followed")
    setup = f"{videos} videos of the demo, {steps} guided steps, float32, {torch.get_num_threads()} thread(s) of a CPU"
    return (
        f"\n{doc_tables.markdown_table(head, table_rows(results))}\n{setup}; dB against the video without a cache.\n\n"
    )


def write_section(path: Path, section: str) -> None:
    """Writes the table between its markers."""
    page = path.read_text("utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{path} cannot take the table: it must have {BEGIN!r} and {END!r}, once each")
    before, _, rest = page.partition(BEGIN)
    path.write_text(before + BEGIN + section + END + rest.partition(END)[2], "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_caching", description=__doc__)
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()
    tune_malloc()
    results = measure(arguments.videos, arguments.steps)
    section = format_section(results, arguments.videos, arguments.steps)
    write_section(PAGE, section)
    print(section)


if __name__ == "__main__":
    main()
