"""`kadr convert`: writes a model as an official single file or as a diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kadr.cli.commands.quantize import Force
from kadr.cli.flags import options
from kadr.cli.flags.parse import check_one_of
from kadr.cli.input_path import find_input
from kadr.cli.terminal.errors import print_stderr
from kadr.cli.terminal.output import print_path
from kadr.cli.terminal.progress import report_tensors, show_progress
from kadr.cli.terminal.table import format_si
from kadr.errors import CheckpointError, RequestError
from kadr.models.registry import LORA, Release
from kadr.validation import expand_home

CONVERT_EPILOG = (
    "Without --dtype every tensor keeps its bits. A LoRA needs no conversion: kadr, ComfyUI and diffusers read each "
    "other's."
)
CONVERT_DTYPE_NAMES = ("bfloat16", "float16", "float32")
Input = Annotated[
    str,
    typer.Argument(
        metavar="IN",
        help="A .safetensors of a model or an upscaler, or a diffusers folder; or a name.",
        show_default=False,
    ),
]
Output = Annotated[
    Path,
    typer.Argument(
        metavar="OUT",
        help="A name that ends in .safetensors is written as a single file, any other as a diffusers folder.",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="|".join(CONVERT_DTYPE_NAMES), help="Dtype of every tensor. [default: as it is]"),
]


def convert(
    source: Input,
    output: Output,
    dtype: Dtype = None,
    models_dir: options.ModelsDir = None,
    force: Force = False,
) -> None:
    """Convert between the official single file and a diffusers folder.

    Prints the path of what it wrote. All of it is written, or nothing.
    """
    if dtype is not None:
        check_one_of("--dtype", dtype, CONVERT_DTYPE_NAMES)
    path, release = find_input(source, _refuse_release, models_dirs=models_dir or ())
    from kadr.checkpoints.checkpoint import Checkpoint  # loads torch
    from kadr.checkpoints.convert.convert import CONVERT_DTYPES, convert_checkpoint
    from kadr.checkpoints.text_encoder import is_text_encoder

    if is_text_encoder(path):
        raise CheckpointError(f"{path} is a text encoder, whose folder is the same in both layouts. Use it as it is.")
    checkpoint = Checkpoint.open(path, release=release)
    with show_progress() as watch:
        result = convert_checkpoint(
            checkpoint,
            expand_home(output),
            dtype=None if dtype is None else CONVERT_DTYPES[dtype],
            replace=force,
            watch=report_tensors("convert", watch),
        )
    print_stderr(f"{format_si(result.source_bytes)} bytes before, {format_si(result.output_bytes)} now")
    for note in result.notes:
        print_stderr(note)
    print_path(output, outcome=f"{output} is written, but its path could not be printed:")


def _refuse_release(release: Release) -> None:
    """Refuses a release that has no other layout.

    Raises:
        RequestError: it is a text encoder, a LoRA, or in fp8.
    """
    if release.kind == LORA or release.kind == "text encoder":
        raise RequestError(f"{release.name} is a {release.kind}, which needs no conversion. Use it as it is.")
    if release.name.endswith("-fp8"):
        name = release.name.removesuffix("-fp8")
        raise RequestError(f"{release.name} is quantized. Convert {name}, its bfloat16 file.")
