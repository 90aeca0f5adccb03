"""`kadr bench`: speed of kadr on this machine, stage by stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

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
from kadr.bench.suites import SUITES, select_cases
from kadr.bench.text_report import report_lines
from kadr.cli.terminal.errors import print_stderr, print_stdout
from kadr.cli.terminal.output import print_lines
from kadr.errors import RequestError

ALL_STAGES, ALL_VARIANTS = ",".join(BENCH_STAGES), ",".join(DEFAULT_VARIANTS)
BENCH_EPILOG = (
    "Separate list entries with commas. Models other than the demo get random weights in a temporary folder: "
    "6.3 GB for 2b, 28.6 for 13b, and 9.5 for the text encoder if it is measured."
)


def _list_option(name: str, title: str, choices: Any, default: str) -> Any:
    metavar = name.lstrip("-").upper() + ",..."
    return typer.Option(name, metavar=metavar, help=f"{title}: {', '.join(choices)}. [default: {default}]")


Models = Annotated[str, _list_option("--model", "Models", MODELS, "demo")]
Sizes = Annotated[
    str | None, _list_option("--size", "Sizes, or any other WxHxF", map(str, VIDEO_SHAPES), "the model's own")
]
Stages = Annotated[str, _list_option("--stage", "Stages", BENCH_STAGES, "all")]
Schedules = Annotated[str, _list_option("--schedule", "Steps and guidance, end to end", SCHEDULES, "8")]
Variants = Annotated[str, _list_option("--variant", "Variants of kadr", VARIANTS, DEFAULT_VARIANTS)]
Suites = Annotated[str | None, _list_option("--suite", "Cases by name, instead of the flags for cases", SUITES, "none")]
PromptTokens = Annotated[
    str,
    typer.Option(
        "--prompt-tokens",
        metavar="N,...",
        help=f"Lengths of the text encoder's prompts, of 256. [default: {PROMPT_TOKENS}]",
    ),
]
NumLayers = Annotated[
    int | None, typer.Option("--num-layers", metavar="N", help="Only the first N blocks of a random model.")
]
Rounds = Annotated[int, typer.Option("--rounds", metavar="N", help="Each round runs every variant once.")]
NoReference = Annotated[bool, typer.Option("--no-reference", help="Do not compare the results with float32.")]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda|mps", help="Where to compute.")]
ModelFolder = Annotated[
    Path | None, typer.Option("--model-folder", metavar="FOLDER", help="Keep the random models there.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def bench(
    model: Models = "demo",
    size: Sizes = None,
    stage: Stages = ALL_STAGES,
    schedule: Schedules = "8",
    prompt_tokens: PromptTokens = str(PROMPT_TOKENS),
    suite: Suites = None,
    variant: Variants = ALL_VARIANTS,
    num_layers: NumLayers = None,
    rounds: Rounds = 5,
    no_reference: NoReference = False,
    device: Device = "auto",
    model_folder: ModelFolder = None,
    json_: Json = False,
) -> None:
    """Measure how fast kadr is on this machine.

    Prints for every stage its time, its share of this machine's matmul rate and peak, its memory and its error against
    float32. Variants run in turns.
    """
    try:
        flags = Selection(
            models=model.split(","),
            shapes=[VideoShape.parse(text) for text in size.split(",")] if size else (),
            stages=stage.split(","),
            schedules=schedule.split(","),
            prompt_tokens=parse_prompt_tokens(prompt_tokens),
            variants=variant.split(","),
            num_layers=num_layers,
            rounds=rounds,
            compare_with_reference=not no_reference,
            device=device,
        )
        selections = select_cases(suite.split(",") if suite else (), flags)
    except RequestError as error:
        raise typer.BadParameter(str(error)) from error
    from kadr.bench.benchmark import run_benchmark

    results = run_benchmark(selections, models_folder=model_folder, log=print_stderr)
    if json_:
        print_stdout(json.dumps(results))
    else:
        print_lines(report_lines(results))
