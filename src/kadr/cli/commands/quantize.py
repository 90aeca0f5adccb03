"""`kadr quantize`: a transformer or a text encoder in fewer bits, as a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kadr.cli.flags.parse import one_of
from kadr.cli.terminal.errors import say
from kadr.cli.terminal.progress import shown
from kadr.cli.terminal.table import in_words
from kadr.errors import CheckpointError, RequestError
from kadr.models.registry import TEXT_ENCODER, Release, find_release
from kadr.pipeline.progress import StageProgress, Watch
from kadr.quant.mixes import MIX_NAMES, Mix, find_mix
from kadr.spec.locate import fetch_release, is_path

if TYPE_CHECKING:
    from kadr.checkpoints.gguf.convert import ConversionResult

EPILOG = (
    "The types are listed from large to small: the fewer bits, the smaller the file, and the farther from the model. "
    "Q5_K, Q4_K and Q3_K mean their _M."
)
SUFFIX = ".gguf"
Given = Annotated[
    str,
    typer.Argument(
        metavar="IN",
        help="A .safetensors, a diffusers folder, a text encoder's folder, a .gguf that is not quantized; or a name.",
        show_default=False,
    ),
]
Wanted = Annotated[Path, typer.Argument(metavar="OUT", help="The .gguf to write.", show_default=False)]
Type = Annotated[
    str, typer.Option("--type", metavar="TYPE", help=f"One of {', '.join(MIX_NAMES)}.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")]


def quantize(given: Given, wanted: Wanted, type: Type, force: Force = False) -> None:
    """Write a transformer or a text encoder in fewer bits.

    Prints the path of the file. The VAE of a model is not in it: give the model's own file with --vae.
    """
    one_of("--type", type.upper(), MIX_NAMES)
    if wanted.suffix.lower() != SUFFIX:
        raise typer.BadParameter(f"{wanted} must end in {SUFFIX}.", param_hint="OUT")
    wanted = wanted.expanduser()
    if wanted.exists() and not force:
        raise RequestError(f"{wanted} is there already. Give --force to replace it, or write to another path.")
    path, released = _located(given)
    with shown() as watch:
        written, left_out = _written(path, released, wanted, find_mix(type), _told_to(watch))
    types = ", ".join(f"{name} ({count})" for name, count in written.type_counts.items())
    say(f"{in_words(written.source_bytes)} bytes before, {in_words(written.output_bytes)} now: {types}")
    if left_out:
        say(left_out)
    print(wanted)


def _located(given: str) -> tuple[Path, Release | None]:
    """The files, and the registry's entry where they are named by it; what is not on disk is fetched."""
    if is_path(given):
        path = Path(given).expanduser()
        if not path.exists():
            raise CheckpointError(f"{path} does not exist. Check the path; `kadr models` lists what is known by name.")
        return path, None
    released = find_release(given)
    if released.kind not in ("model", "text encoder"):
        raise RequestError(f"{given} is a {released.kind}: small enough. Only models and text encoders are quantized.")
    if released.file.endswith(SUFFIX):
        raise RequestError(f"{given} is quantized already, and to do it again loses twice. Take {TEXT_ENCODER}.")
    return fetch_release(released), released


def _written(
    path: Path, released: Release | None, wanted: Path, mix: Mix, told: Callable[[int, int], None]
) -> tuple[ConversionResult, str]:
    """What was written, and what a user has to know is not in the file."""
    from kadr.checkpoints.checkpoint import Checkpoint
    from kadr.checkpoints.gguf.convert import text_encoder_to_gguf, transformer_to_gguf
    from kadr.checkpoints.text_encoder import TextEncoderCheckpoint, is_text_encoder

    if is_text_encoder(path):
        return text_encoder_to_gguf(TextEncoderCheckpoint.open(path), wanted, mix, watch=told), ""
    checkpoint = Checkpoint.open(path, release=released)
    written = transformer_to_gguf(checkpoint, wanted, mix, watch=told)
    vae = f": give it with --vae {path}" if checkpoint.info.has_vae else ", nor was it in what was given"
    return written, f"the VAE is not in this file{vae}"


def _told_to(watch: Watch) -> Callable[[int, int], None]:
    """What turns counts of tensors into reports of a stage."""
    stage: StageProgress | None = None

    def told(done: int, of: int) -> None:
        nonlocal stage
        if stage is None:
            stage = StageProgress("quantizing", of, watch)
        else:
            stage.report(done)

    return told
