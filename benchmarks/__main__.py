"""Measures kadr and other engines on the same work: `python -m benchmarks`, or `make bench`.

Runs the cases of `kadr bench`, with peers in turns with kadr's variants, on the same weights. Writes
benchmarks/results/NAME.json, which `python -m benchmarks.report` puts into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers import PEERS, contender_factories
from kadr.bench.benchmark import run_benchmark
from kadr.bench.cases import (
    BENCH_STAGES,
    DEFAULT_VARIANTS,
    MODELS,
    SCHEDULES,
    VARIANTS,
    VIDEO_SHAPES,
    Selection,
    VideoShape,
)
from kadr.bench.text_report import report_lines
from kadr.errors import KadrError
from kadr.kernels.cpu.malloc import tune_malloc

RESULTS = Path(__file__).parent / "results"


def split_commas(text: str) -> list[str]:
    return text.split(",")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)

    def add_list(name: str, known: Sequence[object], default: Sequence[str]) -> None:
        parser.add_argument(name, type=split_commas, default=list(default), metavar=",".join(map(str, known)))

    add_list("--model", MODELS, ("demo",))
    add_list("--size", VIDEO_SHAPES, ())
    add_list("--stage", BENCH_STAGES, BENCH_STAGES)
    add_list("--schedule", tuple(SCHEDULES), ("8",))
    add_list("--variant", tuple(VARIANTS), DEFAULT_VARIANTS)
    add_list("--peer", tuple(PEERS), tuple(PEERS))
    parser.add_argument(
        "--num-layers", type=int, help="number of blocks in a random model's transformer and text encoder"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-reference", action="store_true", help="do not compare the results with float32")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--matmul", type=int, help="sides of the yardstick's matrices")
    parser.add_argument("--model-folder", type=Path, metavar="FOLDER", help="keep the random models there")
    parser.add_argument("--name", help="name of the result file; by default made from the cases")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument(
        "--default-heap", action="store_true", help="leave freed memory to glibc, as in a program that imports kadr"
    )
    return parser


def result_name(options: argparse.Namespace, device: str) -> str:
    """Returns a name such as cuda-2b-512x320-dit."""
    stages = [] if tuple(options.stage) == BENCH_STAGES else options.stage
    cut = [] if options.num_layers is None else [f"{options.num_layers}-blocks"]
    return "-".join([device, *options.model, *cut, *options.size, *stages, *(s for s in options.schedule if s != "8")])


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    if not options.default_heap:
        tune_malloc()  # as the program `kadr` does
    try:
        selection = Selection(
            models=options.model,
            shapes=[VideoShape.parse(size) for size in options.size],
            stages=options.stage,
            schedules=options.schedule,
            variants=options.variant,
            num_layers=options.num_layers,
            rounds=options.rounds,
            compare_with_reference=not options.no_reference,
            device=options.device,
            matmul_side=options.matmul,
        )
        peers = contender_factories([] if options.no_peers else options.peer)
        result = run_benchmark(
            selection,
            peers,
            models_folder=options.model_folder,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except KadrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result["command"] = " ".join(["python -m benchmarks", *(sys.argv[1:] if arguments is None else arguments)])
    result["heap"] = "default" if options.default_heap else "released at once"
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{options.name or result_name(options, result['machine']['device'])}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(*report_lines(result), "", path, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
