"""kadr and other engines on the same work: `python -m benchmarks`, or `make bench`.

The cases of `kadr bench`, with the peers run in turn with kadr's own ways, on the same weights. Writes
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
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)

    def listed(name: str, known: Sequence[object], default: Sequence[str]) -> None:
        made.add_argument(name, type=split_commas, default=list(default), metavar=",".join(map(str, known)))

    listed("--model", MODELS, ("demo",))
    listed("--size", VIDEO_SHAPES, ())
    listed("--stage", BENCH_STAGES, BENCH_STAGES)
    listed("--schedule", tuple(SCHEDULES), ("8",))
    listed("--variant", tuple(VARIANTS), DEFAULT_VARIANTS)
    listed("--peer", tuple(PEERS), tuple(PEERS))
    made.add_argument("--num-layers", type=int, help="only so many of a random model's transformer and text encoder")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--device", default="auto")
    made.add_argument("--no-reference", action="store_true", help="do not compare the results with float32")
    made.add_argument("--no-peers", action="store_true")
    made.add_argument("--matmul", type=int, help="sides of the yardstick's matrices")
    made.add_argument("--model-folder", type=Path, metavar="FOLDER", help="keep the random models there")
    made.add_argument("--name", help="of the file of results; else made of what was run")
    made.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    made.add_argument("--usual-heap", action="store_true", help="leave freed memory to glibc, as a guest has to")
    return made


def result_name(options: argparse.Namespace, device: str) -> str:
    """Such as cuda-2b-512x320-dit."""
    stages = [] if tuple(options.stage) == BENCH_STAGES else options.stage
    cut = [] if options.layers is None else [f"{options.layers}-layers"]
    return "-".join([device, *options.model, *cut, *options.size, *stages, *(s for s in options.schedule if s != "8")])


def main(arguments: Sequence[str] | None = None) -> int:
    asked = build_parser().parse_args(arguments)
    if not asked.usual_heap:
        tune_malloc()  # as the program `kadr` does
    try:
        selection = Selection(
            models=asked.model,
            shapes=[VideoShape.parse(size) for size in asked.size],
            stages=asked.stage,
            schedules=asked.schedule,
            variants=asked.way,
            num_layers=asked.layers,
            rounds=asked.rounds,
            compare_with_reference=not asked.no_reference,
            device=asked.device,
            matmul_side=asked.matmul,
        )
        peers = contender_factories([] if asked.no_peers else asked.peer)
        made = run_benchmark(
            selection, peers, models_folder=asked.models, log=lambda line: print(line, file=sys.stderr, flush=True)
        )
    except KadrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    made["command"] = " ".join(["python -m benchmarks", *(sys.argv[1:] if arguments is None else arguments)])
    made["heap"] = "usual" if asked.usual_heap else "given back at once"
    asked.results.mkdir(parents=True, exist_ok=True)
    path = asked.results / f"{asked.name or result_name(asked, made['machine']['device'])}.json"
    path.write_text(json.dumps(made, indent=1) + "\n", "utf-8")
    print(*report_lines(made), "", path, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
