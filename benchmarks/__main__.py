"""Measures kadr and other engines on the same work: `python -m benchmarks`, or `make bench`.

Runs the cases of `kadr bench`, with peers in turns with kadr's variants, on the same weights. Writes
benchmarks/results/NAME.json after each case, which `python -m benchmarks.report` puts into docs/performance.md. An
interrupted run goes on with the same command and `--resume`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS, contender_factories
from kadr.atomic_write import atomic_file
from kadr.bench.benchmark import run_benchmark
from kadr.bench.cases import (
    BENCH_STAGES,
    DEFAULT_VARIANTS,
    MODELS,
    PROMPT_TOKENS,
    SCHEDULES,
    VARIANTS,
    VIDEO_SHAPES,
    Selection,
    VideoShape,
    parse_prompt_tokens,
)
from kadr.bench.machine import describe_machine
from kadr.bench.suites import SUITES, select_cases
from kadr.bench.text_report import report_lines
from kadr.errors import KadrError, RequestError
from kadr.kernels.cpu.malloc import tune_malloc
from kadr.memory.device import pick_device

# What the cases of one result share.
SAME_MACHINE = ("cpu", "cores", "threads", "torch", "kadr", "revision", "device")
RESULTS = Path(__file__).parent / "results"


def split_commas(text: str) -> list[str]:
    return text.split(",")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)

    def add_list(name: str, known: Sequence[object], default: Sequence[str]) -> None:
        parser.add_argument(name, type=split_commas, default=list(default), metavar=",".join(map(str, known)))

    add_list("--suite", tuple(SUITES), ())
    add_list("--model", MODELS, ("demo",))
    add_list("--size", VIDEO_SHAPES, ())
    add_list("--stage", BENCH_STAGES, BENCH_STAGES)
    add_list("--schedule", tuple(SCHEDULES), ("8",))
    parser.add_argument("--prompt-tokens", default=str(PROMPT_TOKENS), help="lengths of the text encoder's prompts")
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
    parser.add_argument(
        "--resume", action="store_true", help="keep the cases that the result file has, and measure the others"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument(
        "--default-heap", action="store_true", help="leave freed memory to glibc, as in a program that imports kadr"
    )
    return parser


def result_name(options: argparse.Namespace, device: str) -> str:
    """Returns a name such as cuda-2b-512x320-dit, or cpu-released."""
    if options.suite:
        return "-".join([device, *options.suite])
    stages = [] if tuple(options.stage) == BENCH_STAGES else options.stage
    cut = [] if options.num_layers is None else [f"{options.num_layers}-blocks"]
    return "-".join([device, *options.model, *cut, *options.size, *stages, *(s for s in options.schedule if s != "8")])


def selections_of(options: argparse.Namespace) -> list[Selection]:
    flags = Selection(
        models=options.model,
        shapes=[VideoShape.parse(size) for size in options.size],
        stages=options.stage,
        schedules=options.schedule,
        prompt_tokens=parse_prompt_tokens(options.prompt_tokens),
        variants=options.variant,
        num_layers=options.num_layers,
        rounds=options.rounds,
        compare_with_reference=not options.no_reference,
        device=options.device,
        matmul_side=options.matmul,
    )
    return select_cases(options.suite, flags)


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    typed = sys.argv[1:] if arguments is None else arguments
    extra = {
        "command": " ".join(["python -m benchmarks", *(word for word in typed if word != "--resume")]),
        "heap": "default" if options.default_heap else "released at once",
    }
    if not options.default_heap:
        tune_malloc()  # as the program `kadr` does
    try:
        selections = selections_of(options)
        device = pick_device(options.device)
        path = options.results / f"{options.name or result_name(options, device.type)}.json"
        result = run_benchmark(
            selections,
            contender_factories([] if options.no_peers else options.peer),
            models_folder=options.model_folder,
            log=lambda line: print(line, file=sys.stderr, flush=True),
            earlier=earlier_cases(path, extra["command"], describe_machine(device)) if options.resume else [],
            save=lambda result: write_result(path, {**result, **extra}),
        )
    except KadrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_result(path, {**result, **extra})
    print(*report_lines(result), "", path, sep="\n")
    return 0


def earlier_cases(path: Path, command: str, machine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the cases of an interrupted run; [] where there is none.

    Raises:
        RequestError: it was another command, machine or revision, with whose figures none of now can be compared.
    """
    if not path.exists():
        return []
    result = json.loads(path.read_text("utf-8"))
    then = {name: result["machine"].get(name) for name in SAME_MACHINE} | {"command": result["command"]}
    now = {name: machine[name] for name in SAME_MACHINE} | {"command": command}
    if other := [name for name in now if now[name] != then[name]]:
        name = other[0]
        raise RequestError(
            f"{path} was measured with {name} {then[name]!r}, and this run has {now[name]!r}. Leave --resume out to "
            "measure all cases again, or give another --name."
        )
    cases: list[dict[str, Any]] = result["cases"]
    return cases


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
