"""`kadr quantize`: writes a quantized transformer or text encoder as a GGUF file."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kadr.cli.flags import options
from kadr.cli.flags.parse import check_one_of
from kadr.cli.input_path import find_input
from kadr.cli.terminal.errors import print_stderr
from kadr.cli.terminal.output import print_path
from kadr.cli.terminal.progress import report_tensors, show_progress
from kadr.cli.terminal.table import format_si
from kadr.errors import RequestError
from kadr.models.registry import DEFAULT_TEXT_ENCODER, MODEL_RELEASES, Release
from kadr.quant.mixes import MIX_NAMES, Mix, find_mix
from kadr.spec.locate import MODEL, PACKAGE_ROOT, ModelComponent, find_release_on_disk
from kadr.validation import expand_home, refuse_overwriting_source

if TYPE_CHECKING:
    from kadr.checkpoints.gguf.convert import ConversionResult

QUANTIZE_EPILOG = (
    "Types are listed from large to small: fewer bits make a smaller file that is farther from the model. "
    "Q5_K, Q4_K and Q3_K mean their _M."
)
EXAMPLE_PROMPT = "a red circle moving right on a black background"  # in the command that is printed
EXAMPLE_MODEL = "ltxv-2b-0.9.8-distilled"  # the smallest of those with the released text encoder
SUFFIX = ".gguf"
MAX_NOTE = 5000  # characters: a command that is to be copied is not cut
Input = Annotated[
    str,
    typer.Argument(
        metavar="IN",
        help="A .safetensors, a diffusers folder, a text encoder, a .gguf that is not quantized; or a name.",
        show_default=False,
    ),
]
Output = Annotated[Path, typer.Argument(metavar="OUT", help="The .gguf to write.", show_default=False)]
Type = Annotated[
    str, typer.Option("--type", metavar="TYPE", help=f"One of {', '.join(MIX_NAMES)}.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")]


def quantize(
    source: Input,
    output: Output,
    type: Type,
    release: options.Release = None,
    models_dir: options.ModelsDir = None,
    force: Force = False,
) -> None:
    """Quantize a transformer or a text encoder.

    Prints the path of the GGUF file, and on stderr a command that uses it. The file remembers where its VAE and its
    text encoder come from.
    """
    check_one_of("--type", type.upper(), MIX_NAMES)
    if output.suffix.lower() != SUFFIX:
        raise typer.BadParameter(f"{output} must end in {SUFFIX}.", param_hint="OUT")
    output = expand_home(output)
    refuse_overwriting_source(output, [expand_home(source)])
    if output.exists() and not force:
        raise RequestError(f"{output} exists already. Pass --force to replace it, or write to another path.")
    path, known_release = find_input(source, _refuse_release, stated_release=release, models_dirs=models_dir or ())
    with show_progress() as watch:
        result, notes = _write_quantized(path, known_release, output, find_mix(type), report_tensors("quantize", watch))
    types = ", ".join(f"{name} ({count})" for name, count in result.type_counts.items())
    print_stderr(f"{format_si(result.source_bytes)} bytes before, {format_si(result.output_bytes)} now: {types}")
    for note in notes:
        print_stderr(note, limit=MAX_NOTE)
    print_path(output, outcome=f"{output} is written, but its path could not be printed:")


def _refuse_release(release: Release) -> None:
    """Refuses a release that cannot be quantized.

    Raises:
        RequestError: it is neither a model nor a text encoder, or is quantized already.
    """
    name = release.name
    if release.kind not in ("model", "text encoder"):
        raise RequestError(f"{name} is a {release.kind}: small enough. Only models and text encoders are quantized.")
    if release.file.endswith(SUFFIX):
        raise RequestError(
            f"{name} is quantized already; quantizing it again loses precision twice. Use {DEFAULT_TEXT_ENCODER}."
        )


def _write_quantized(
    path: Path, release: Release | None, output: Path, mix: Mix, watch: Callable[[int, int], None]
) -> tuple[ConversionResult, list[str]]:
    """Writes the file; returns the result, and notes: what the file lacks, and the command that uses it."""
    from kadr.checkpoints.checkpoint import Checkpoint
    from kadr.checkpoints.gguf.convert import text_encoder_to_gguf, transformer_to_gguf
    from kadr.checkpoints.gguf.origins import TEXT_ENCODER_FIELD, VAE_FIELD
    from kadr.checkpoints.text_encoder import TextEncoderCheckpoint, is_text_encoder
    from kadr.spec.origins import component_origins
    from kadr.spec.tokenizer import fetch_tokenizer

    if is_text_encoder(path):
        text_encoder_checkpoint = fetch_tokenizer(TextEncoderCheckpoint.open(path))
        result = text_encoder_to_gguf(text_encoder_checkpoint, output, mix, watch=watch)
        return result, [_usage(_model_with_text_encoder(path, release), "--text-encoder", str(output))]
    checkpoint = Checkpoint.open(path, release=release)
    is_release = release is not None and find_release_on_disk(release) == path  # and not a file that it was stated for
    model = ModelComponent(MODEL, str(path), path, release if is_release else None)
    origins = component_origins(model, checkpoint)
    result = transformer_to_gguf(checkpoint, output, mix, origins=origins, watch=watch)
    vae, text_encoder = origins.get(VAE_FIELD), origins.get(TEXT_ENCODER_FIELD)
    if vae is None:
        note = "the VAE is not in this file, nor was it in the input: replace VAE in the command"
        return result, [note, _usage(str(output), "--vae", "VAE")]
    note = f"the VAE is not in this file, which remembers it: {vae.name or vae.path}"
    if text_encoder is not None:
        note += f"; and its text encoder: {text_encoder.name or text_encoder.path}"
    return result, [note, _usage(str(output))]


def _usage(model: str, *more: str) -> str:
    """Returns the command that uses a file, for a shell."""
    return f"use it: {_join(('kadr', 'generate', EXAMPLE_PROMPT, '--model', model, *more))}"


def _join(args: Sequence[str]) -> str:
    return subprocess.list2cmdline(args) if sys.platform == "win32" else shlex.join(args)


def _model_with_text_encoder(path: Path, release: Release | None) -> str:
    """Returns the name of a released model with this text encoder; MODEL where none is known."""
    if release is not None:
        return EXAMPLE_MODEL
    bundled = (model.name for model in MODEL_RELEASES if path.resolve() == (PACKAGE_ROOT / model.file).parent)
    return next(bundled, "MODEL")
