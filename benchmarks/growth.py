"""Whether costs grow as they must: `python -m benchmarks.growth`.

Times the transformer against tokens, and the decoder's time and memory against frames, and fits a power to each. What
the power must be comes from the same formulas that count the products. All sizes of all contenders run in turns.
Writes benchmarks/results/growth-DEVICE-MODEL.json, of which `python -m benchmarks.report` makes a table and a plot.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import PEERS, contender_factories
from kadr.bench.cases import DECODE, DIT, MODELS, VARIANTS, Selection, VideoShape
from kadr.bench.kadr_contenders import kadr_contenders
from kadr.bench.machine import describe_machine
from kadr.bench.model_files import open_model_files
from kadr.bench.peak_memory import cuda_peak_bytes, host_peak_bytes
from kadr.bench.runner import Contender, Measurement, SkippedContender, cuda_clock, host_clock, measure
from kadr.bench.stage_case import StageCase
from kadr.kernels.cpu.malloc import tune_malloc
from kadr.memory.device import pick_device
from kadr.shapes import Size

RESULTS = Path(__file__).parent / "results"
TRANSFORMER_SIDES = {
    "demo": (256, 384, 512, 768),
    "2b": (128, 192, 256, 384),
    "13b": (128, 192, 256, 384),
}  # of 25 frames
DECODE_FRAMES = (17, 33, 65, 129)
DECODE_SIZE = Size(256, 256)


@dataclass(frozen=True)
class Curve:
    """What something costs at some sizes.

    Args:
        quantity: "DiT step", "decode" or "decode's memory"; in seconds or bytes.
        variable: what grows: "tokens" or "frames".
        exponent: of the power that fits best; None where it cannot be fitted.
        expected_exponent: that the formulas have.
    """

    quantity: str
    variable: str
    contender: str
    x: list[int]
    y: list[float]
    exponent: float | None
    expected_exponent: float


def fit_exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """p of the c·x^p nearest to y: the slope of the logarithms by least squares. None where a y is not above 0."""
    if len(x) < 2 or min(y) <= 0:
        return None
    across, up = ([math.log(value) for value in values] for values in (x, y))
    middle, height = sum(across) / len(across), sum(up) / len(up)
    moved = [value - middle for value in across]
    return sum(a * (b - height) for a, b in zip(moved, up, strict=True)) / sum(a * a for a in moved)


def measure_curves(
    stage_cases: Sequence[StageCase], factory: Callable[[StageCase, ExitStack], Iterator[Any]], rounds: int
) -> Iterator[Curve]:
    """Time, and of a decoder also memory, of every contender over all works, which are of one stage."""
    first = stage_cases[0]
    on_cuda, decoding = first.device.type == "cuda", first.stage == DECODE
    over = "frames" if decoding else "tokens"
    x = [work.shape.frames if decoding else work.shape.grid.num_tokens for work in stage_cases]
    with ExitStack() as stack:
        ready = [each for work in stage_cases for each in factory(work, stack) if isinstance(each, Contender)]
        noted, failed = measure(
            ready,
            rounds=rounds,
            warm_ups=3 if on_cuda else 1,
            clock=cuda_clock if on_cuda else host_clock,
            peak=cuda_peak_bytes if on_cuda else host_peak_bytes,
        )
    if failed:
        raise SystemExit("; ".join(f"{each.name} {each.reason}" for each in failed))
    work_done = [float(work.flops or 0) for work in stage_cases]
    for name in dict.fromkeys(each.contender.name for each in noted):
        own = [each for each in noted if each.contender.name == name]
        yield _time_curve("decode" if decoding else "DiT step", over, name, x, [each.median for each in own], work_done)
        if decoding:
            yield _memory_curve(name, x, own)


def _time_curve(quantity: str, variable: str, name: str, x: list[int], y: list[float], flops: Sequence[float]) -> Curve:
    expected = fit_exponent(x, flops)
    assert expected is not None
    return Curve(quantity, variable, name, x, y, fit_exponent(x, y), expected)


def _memory_curve(name: str, x: list[int], measurements: Sequence[Measurement]) -> Curve:
    """Kadr hands frames on, so what it takes must not grow; who returns the whole clip takes it whole."""
    y = [float(each.peak_bytes or 0) for each in measurements]
    return Curve("decode's memory", "frames", name, x, y, fit_exponent(x, y), 0.0 if name.startswith("kadr") else 1.0)


def streamed_decode(stage_case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
    """kadr's decoder whose frames are handed on and not kept, as when they go into a file."""
    engine = stage_case.open_engine(VARIANTS["auto"])
    parts = engine.components
    parts.apply_plan(engine.plan(stage_case.request))
    vae = stack.enter_context(parts.vae_decoder())
    latents, level = stage_case.inputs["latents"].to(parts.dtype), stage_case.inputs["level"]

    def run() -> None:
        for _ in vae.decode_stream(latents, timestep=level if stage_case.vae_config.timestep_conditioning else None):
            pass

    yield Contender(name="kadr auto", run=run, dtype=str(parts.dtype).removeprefix("torch."), is_kadr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--side", type=int, nargs="+", help="of the pictures that the transformer gets")
    parser.add_argument("--frames", type=int, nargs="+", default=DECODE_FRAMES, help="that are decoded")
    parser.add_argument("--peer", choices=PEERS, nargs="*", help="the official package for the demo, else diffusers")
    parser.add_argument("--model-folder", type=Path, metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    tune_malloc()
    device = pick_device(asked.device)
    selection = Selection(models=(asked.model,), num_layers=asked.layers, stages=(DIT, DECODE))
    others = contender_factories(
        asked.peer if asked.peer is not None else ["official" if asked.model == "demo" else "diffusers"]
    )

    def everyone(own: Any) -> Callable[[StageCase, ExitStack], Iterator[Any]]:
        return lambda work, stack: (each for enter in (own, *others) for each in enter(work, stack))

    made: dict[str, Any] = {"machine": describe_machine(device), "model": asked.model, "layers": asked.layers}
    with open_model_files(asked.model, selection, asked.models) as source, torch.no_grad():
        sized = [VideoShape(Size(side, side), 25) for side in asked.side or TRANSFORMER_SIDES[asked.model]]
        long = [VideoShape(DECODE_SIZE, frames) for frames in asked.frames]
        steps = measure_curves(
            [StageCase(source, clip, DIT, device) for clip in sized], everyone(kadr_contenders(("auto",))), asked.rounds
        )
        decodes = measure_curves(
            [StageCase(source, clip, DECODE, device) for clip in long], everyone(streamed_decode), asked.rounds
        )
        made["curves"] = [asdict(curve) for curve in (*steps, *decodes)]
    asked.results.mkdir(parents=True, exist_ok=True)
    path = asked.results / f"growth-{device.type}-{asked.model}.json"
    path.write_text(json.dumps(made, indent=1) + "\n", "utf-8")
    for curve in made["curves"]:
        print("{what} over {over}, {contender}: {exponent}, expected {expected:.2f}".format(**curve))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
