"""Checks that costs grow as the formulas say: `python -m benchmarks.growth`.

Measures the transformer's time against tokens, and the decoder's time and memory against frames, and fits a power to
each. The expected exponent is fitted to the FLOPs. All sizes of all contenders run in turns. Writes
benchmarks/results/growth-DEVICE-MODEL.json, which `python -m benchmarks.report` turns into a table and a plot.
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
# Sides of square videos of 25 frames.
TRANSFORMER_SIDES = {"demo": (256, 384, 512, 768), "2b": (128, 192, 256, 384), "13b": (128, 192, 256, 384)}
DECODE_FRAMES = (17, 33, 65, 129)
DECODE_SIZE = Size(256, 256)


@dataclass(frozen=True)
class Curve:
    """The cost of a stage over several sizes.

    Args:
        quantity: "DiT step", "decode" or "decode's memory"; in seconds or bytes.
        variable: "tokens" or "frames".
        exponent: exponent of the best-fitting power; None where none can be fitted.
        expected_exponent: exponent by the formulas.
    """

    quantity: str
    variable: str
    contender: str
    x: list[int]
    y: list[float]
    exponent: float | None
    expected_exponent: float


def fit_exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Returns the p of the c·x^p that fits y best, by least squares on logarithms; None where some y is 0 or less."""
    if len(x) < 2 or min(y) <= 0:
        return None
    log_x, log_y = ([math.log(value) for value in values] for values in (x, y))
    mean_x, mean_y = sum(log_x) / len(log_x), sum(log_y) / len(log_y)
    centered = [value - mean_x for value in log_x]
    return sum(a * (b - mean_y) for a, b in zip(centered, log_y, strict=True)) / sum(a * a for a in centered)


def measure_curves(
    stage_cases: Sequence[StageCase], factory: Callable[[StageCase, ExitStack], Iterator[Any]], rounds: int
) -> Iterator[Curve]:
    """Yields the time curve of every contender, and its memory curve for the decoder.

    Args:
        stage_cases: cases of one stage, by size.
    """
    first = stage_cases[0]
    on_cuda, is_decode = first.device.type == "cuda", first.stage == DECODE
    variable = "frames" if is_decode else "tokens"
    x = [case.shape.frames if is_decode else case.shape.grid.num_tokens for case in stage_cases]
    with ExitStack() as stack:
        created = (contender for case in stage_cases for contender in factory(case, stack))
        contenders = [contender for contender in created if isinstance(contender, Contender)]
        measurements, failed = measure(
            contenders,
            rounds=rounds,
            warm_ups=3 if on_cuda else 1,
            clock=cuda_clock if on_cuda else host_clock,
            peak=cuda_peak_bytes if on_cuda else host_peak_bytes,
        )
    if failed:
        raise SystemExit("; ".join(f"{contender.name} {contender.reason}" for contender in failed))
    flops = [float(case.flops or 0) for case in stage_cases]
    for name in dict.fromkeys(each.contender.name for each in measurements):
        same_name = [each for each in measurements if each.contender.name == name]
        seconds = [each.median for each in same_name]
        yield _time_curve("decode" if is_decode else "DiT step", variable, name, x, seconds, flops)
        if is_decode:
            yield _memory_curve(name, x, same_name)


def _time_curve(quantity: str, variable: str, name: str, x: list[int], y: list[float], flops: Sequence[float]) -> Curve:
    expected = fit_exponent(x, flops)
    assert expected is not None
    return Curve(quantity, variable, name, x, y, fit_exponent(x, y), expected)


def _memory_curve(name: str, x: list[int], measurements: Sequence[Measurement]) -> Curve:
    """Returns a memory curve. Kadr streams its frames, so its memory must not grow; peers return the whole video."""
    y = [float(each.peak_bytes or 0) for each in measurements]
    return Curve("decode's memory", "frames", name, x, y, fit_exponent(x, y), 0.0 if name.startswith("kadr") else 1.0)


def streamed_decode(stage_case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
    """Yields kadr's decoder with its frames dropped as they come, as when they go into a file."""
    engine = stage_case.open_engine(VARIANTS["auto"])
    dtype, generation = engine.spec.dtype, stack.enter_context(engine.start(stage_case.request))
    vae = stack.enter_context(generation.modules.vae_decoder())
    latents = stage_case.inputs["latents"].to(dtype)
    timestep = stage_case.inputs["decode_timestep"] if stage_case.vae_config.timestep_conditioning else None

    def run() -> None:
        for _ in vae.decode_stream(latents, timestep=timestep):
            pass

    yield Contender(name="kadr auto", run=run, dtype=str(dtype).removeprefix("torch."), is_kadr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--side", type=int, nargs="+", help="sides of the transformer's videos")
    parser.add_argument("--frames", type=int, nargs="+", default=DECODE_FRAMES, help="numbers of frames to decode")
    parser.add_argument("--peer", choices=PEERS, nargs="*", help="default: official for the demo, diffusers for others")
    parser.add_argument("--model-folder", type=Path, metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    tune_malloc()
    device = pick_device(options.device)
    selection = Selection(models=(options.model,), num_layers=options.num_layers, stages=(DIT, DECODE))
    default_peers = ["official" if options.model == "demo" else "diffusers"]
    peers = contender_factories(options.peer if options.peer is not None else default_peers)

    def with_peers(kadr_factory: Any) -> Callable[[StageCase, ExitStack], Iterator[Any]]:
        return lambda case, stack: (
            contender for factory in (kadr_factory, *peers) for contender in factory(case, stack)
        )

    result: dict[str, Any] = {
        "machine": describe_machine(device),
        "model": options.model,
        "num_layers": options.num_layers,
    }
    with open_model_files(options.model, selection, options.model_folder) as files, torch.no_grad():
        sides = options.side or TRANSFORMER_SIDES[options.model]
        by_side = [VideoShape(Size(side, side), 25) for side in sides]
        by_length = [VideoShape(DECODE_SIZE, frames) for frames in options.frames]
        step_curves = measure_curves(
            [StageCase(files, shape, DIT, device) for shape in by_side],
            with_peers(kadr_contenders(("auto",))),
            options.rounds,
        )
        decode_curves = measure_curves(
            [StageCase(files, shape, DECODE, device) for shape in by_length],
            with_peers(streamed_decode),
            options.rounds,
        )
        result["curves"] = [asdict(curve) for curve in (*step_curves, *decode_curves)]
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"growth-{device.type}-{options.model}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    for curve in result["curves"]:
        print("{quantity} over {variable}, {contender}: {exponent}, expected {expected_exponent:.2f}".format(**curve))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
