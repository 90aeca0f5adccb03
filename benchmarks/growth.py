"""Checks that costs grow as the formulas say: `python -m benchmarks.growth`.

Measures the transformer's time against tokens, and the decoder's time and memory against frames, and fits a power to
each. The expected exponent is fitted to the FLOPs of the same sizes and blocks. All sizes of all contenders run in
turns. Writes benchmarks/results/growth-DEVICE-MODEL.json after each stage, which `python -m benchmarks.report` turns
into a table and a plot.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch

from benchmarks.__main__ import RESULTS, write_result
from benchmarks.peers import PEERS, contender_factories
from kadr.bench.benchmark import WARM_UPS
from kadr.bench.cases import DECODE, DEMO, DIT, MODELS, VARIANTS, Selection, VideoShape
from kadr.bench.kadr_contenders import kadr_contenders
from kadr.bench.machine import describe_machine
from kadr.bench.model_files import open_model_files
from kadr.bench.peak_memory import peak_memory_for
from kadr.bench.runner import Contender, Measurement, SkippedContender, clock_for, measure
from kadr.bench.stage_case import ContenderFactory, StageCase
from kadr.kernels.cpu.malloc import tune_malloc
from kadr.memory.device import pick_device
from kadr.shapes import Size

SQUARES = ("256x256x25", "384x384x25", "512x512x25", "768x768x25")  # 256 to 2,304 tokens, which the demo can take
# 256, 640, 2,048, 6,144 and 13,376 tokens: to the largest that people make.
RELEASED_SIZES = ("256x256x25", "512x320x25", "512x512x57", "768x512x121", "1216x704x121")
RELEASED_LAYERS = 2  # blocks of a random model: each of its sizes has a module of its own in memory
DEFAULT_PEERS = {DEMO: ("official",)}  # of others, OpenVINO
DECODE_FRAMES = (17, 33, 65, 129)
DECODE_SIZE = Size(256, 256)
Point = tuple[StageCase, Measurement]


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


def measure_curves(stage_cases: Sequence[StageCase], factory: ContenderFactory, rounds: int) -> Iterator[Curve]:
    """Yields the time curve of every contender, and its memory curve for the decoder.

    Args:
        stage_cases: cases of one stage, by size.
    """
    first = stage_cases[0]
    with ExitStack() as stack:
        contenders = [
            (case, contender)
            for case in stage_cases
            for contender in factory(case, stack)
            if _is_ready(case, contender)
        ]
        measurements, failed = measure(
            [contender for _, contender in contenders],
            rounds=rounds,
            warm_ups=WARM_UPS.get(first.device.type, 1),
            clock=clock_for(first.device),
            peak=peak_memory_for(first.device),
        )
    if failed:
        raise SystemExit("; ".join(f"{contender.name} {contender.reason}" for contender in failed))
    measured = [(case, each) for (case, _), each in zip(contenders, measurements, strict=True)]
    for name in dict.fromkeys(each.contender.name for each in measurements):
        points = [(case, each) for case, each in measured if each.contender.name == name]
        if len(points) < 2:
            print(f"{name}: one size makes no curve", file=sys.stderr)
            continue
        yield _time_curve(name, points)
        if first.stage == DECODE:
            yield _memory_curve(name, points)


def _is_ready(stage_case: StageCase, contender: Contender | SkippedContender) -> TypeGuard[Contender]:
    """Returns whether it can be measured; if not, says why on stderr."""
    if isinstance(contender, SkippedContender):
        print(f"{stage_case}: {contender.name} {contender.reason}", file=sys.stderr)
        return False
    return True


def _time_curve(name: str, points: Sequence[Point]) -> Curve:
    is_decode = points[0][0].stage == DECODE
    x = [case.shape.frames if is_decode else case.shape.grid.num_tokens for case, _ in points]
    y = [measurement.median for _, measurement in points]
    expected = fit_exponent(x, [float(case.flops or 0) for case, _ in points])
    assert expected is not None
    quantity, variable = ("decode", "frames") if is_decode else ("DiT step", "tokens")
    return Curve(quantity, variable, name, x, y, fit_exponent(x, y), expected)


def _memory_curve(name: str, points: Sequence[Point]) -> Curve:
    """Returns a memory curve. Kadr streams its frames, so its memory must not grow; peers return the whole video."""
    x = [case.shape.frames for case, _ in points]
    y = [float(measurement.peak_bytes or 0) for _, measurement in points]
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default=DEMO)
    parser.add_argument("--num-layers", type=int, help=f"blocks of a random model; by default {RELEASED_LAYERS}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--stage", choices=(DIT, DECODE), nargs="+", default=(DIT, DECODE))
    parser.add_argument("--size", nargs="+", help="videos of the transformer; by default 256 to 13,376 tokens")
    parser.add_argument("--frames", type=int, nargs="+", default=DECODE_FRAMES, help="numbers of frames to decode")
    parser.add_argument("--variant", choices=VARIANTS, nargs="+", default=("auto",), help="of the transformer")
    parser.add_argument("--peer", choices=PEERS, nargs="*", help="default: official for the demo, openvino for others")
    parser.add_argument("--model-folder", type=Path, metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def shapes_of(stage: str, options: argparse.Namespace) -> list[VideoShape]:
    """Returns the videos of a stage's curve."""
    if stage == DECODE:
        return [VideoShape(DECODE_SIZE, frames) for frames in options.frames]
    sizes = options.size or (SQUARES if options.model == DEMO else RELEASED_SIZES)
    return [VideoShape.parse(size) for size in sizes]


def factory_of(stage: str, options: argparse.Namespace) -> ContenderFactory:
    """Returns a factory of kadr's contenders and of the peers'."""
    peers = DEFAULT_PEERS.get(options.model, ("openvino",)) if options.peer is None else options.peer
    kadr_factory = kadr_contenders(options.variant) if stage == DIT else streamed_decode
    factories = [kadr_factory, *contender_factories(peers)]
    return lambda case, stack: (contender for factory in factories for contender in factory(case, stack))


def measure_growth(options: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Returns the curves of all stages; they are saved after each stage."""
    device = pick_device(options.device)
    num_layers = options.num_layers or (None if options.model == DEMO else RELEASED_LAYERS)
    selection = Selection(models=(options.model,), num_layers=num_layers, stages=options.stage)
    result: dict[str, Any] = {"machine": describe_machine(device), "model": options.model, "num_layers": num_layers}
    result["curves"] = []
    with open_model_files(options.model, selection, options.model_folder) as files, torch.no_grad():
        for stage in options.stage:
            cases = [StageCase(files, shape, stage, device) for shape in shapes_of(stage, options)]
            curves = measure_curves(cases, factory_of(stage, options), options.rounds)
            result["curves"] += [asdict(curve) for curve in curves]
            save(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    tune_malloc()
    path = options.results / f"growth-{pick_device(options.device).type}-{options.model}.json"
    result = measure_growth(options, partial(write_result, path))
    for curve in result["curves"]:
        print("{quantity} over {variable}, {contender}: {exponent}, expected {expected_exponent:.2f}".format(**curve))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
