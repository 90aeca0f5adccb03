"""`kadr inspect`: what a file is, from its header."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kadr.cli.flags import options
from kadr.cli.terminal.table import format_columns, format_si
from kadr.errors import CheckpointError
from kadr.kernels.ggml_types import GGML_TYPES

VIDEO_SUFFIXES = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi"}
TEXT_ENCODER = "text encoder"
MAX_UNEXPECTED_KEYS = 20  # of a LoRA, that are named; --json has all
REMEDIES = {
    "transformer": "give a checkpoint with one as --model, and this one as --vae",
    "vae": "give a checkpoint with one as --vae",
    TEXT_ENCODER: "fetched from the hub, or give a folder or a .gguf as --text-encoder",
}
Target = Annotated[
    Path,
    typer.Argument(
        metavar="PATH", help="A .safetensors, a .gguf, a folder, or an .mp4 that kadr made.", show_default=False
    ),
]


def inspect(path: Target, as_json: options.Json = False) -> None:
    """Tell what a file is.

    Of a checkpoint: its version, its parts and what it lacks, from the header alone. Of a LoRA: what it changes, and
    for which model. Of a video: its request.
    """
    path = _find_by_name(path.expanduser())
    if path.suffix.lower() in VIDEO_SUFFIXES:
        found, lines = _video(path)
    else:
        found, lines = _weights(path)
    print(json.dumps(found) if as_json else "\n".join(lines))


def _find_by_name(path: Path) -> Path:
    """The file of a name that `kadr models` lists and that is on disk."""
    from kadr.models.registry import RELEASES_BY_NAME
    from kadr.spec.locate import find_release_on_disk

    found = (
        None
        if path.exists() or str(path) not in RELEASES_BY_NAME
        else find_release_on_disk(RELEASES_BY_NAME[str(path)])
    )
    return path if found is None else found


def _video(path: Path) -> tuple[dict[str, Any], Iterator[str]]:
    from kadr.media.clip import read_metadata

    record = read_metadata(path)
    return record, _fields(record)


def _fields(record: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A line per entry; what was left out is not shown."""
    width = max(map(len, record), default=0)
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}"
            yield from _fields(value, indent + "  ")
        elif value is not None:
            shown = value if isinstance(value, str) else json.dumps(value)
            yield f"{indent}{name:<{width}}  {shown}"


def _weights(path: Path) -> tuple[dict[str, Any], Iterator[str]]:
    from kadr.checkpoints.lora.file import is_lora
    from kadr.checkpoints.text_encoder import is_text_encoder

    if not path.exists():
        raise CheckpointError(f"{path} does not exist. Check the path; `kadr models` lists what is known by name.")
    if is_text_encoder(path):
        return _text_encoder(path)
    return _lora(path) if is_lora(path) else _checkpoint(path)


def _text_encoder(path: Path) -> tuple[dict[str, Any], Iterator[str]]:
    from kadr.checkpoints.text_encoder import TextEncoderCheckpoint

    part = asdict(TextEncoderCheckpoint.open(path).describe())
    found = {"path": str(path), "family": "T5", "parts": [part]}
    return found, iter(("T5 text encoder", *_format_components([part])))


def _lora(path: Path) -> tuple[dict[str, Any], Iterator[str]]:
    from kadr.checkpoints.lora.file import LoraFile

    # What is strange in it is told, as everything else.
    found = {"kind": "LoRA", **asdict(LoraFile.open(path, allow_partial=True).describe())}
    return found, _format_lora(found)


def _format_lora(found: Mapping[str, Any]) -> Iterator[str]:
    fits = f" for {found['fits']}" if found["fits"] else ""
    yield f"LTX-Video LoRA{fits}, with the names of {found['family']}"
    ranks, alphas, scales = (", ".join(f"{value:g}" for value in found[name]) for name in ("ranks", "alphas", "scales"))
    yield f"rank {ranks}, alpha {alphas or 'the same'}; scale {scales} at strength 1"
    yield f"{found['layers']} layers in {found['blocks']} blocks, {format_si(found['bytes'])}B in {found['dtype']}"
    yield from format_columns(
        [("layer", "how many"), *((name, str(count)) for name, count in found["targets"].items())]
    )
    if found["reference_downscale"]:
        times = found["reference_downscale"]
        yield f"in context: its reference has the size of the video{f' divided by {times}' if times > 1 else ''}"
    strangers = found["strangers"]
    for name in strangers[:MAX_UNEXPECTED_KEYS]:
        yield f"of no layer: {name}"
    if len(strangers) > MAX_UNEXPECTED_KEYS:
        yield f"of no layer: {len(strangers) - MAX_UNEXPECTED_KEYS} more"
    yield from _fields(found["metadata"])


def _checkpoint(path: Path) -> tuple[dict[str, Any], Iterator[str]]:
    from kadr.checkpoints.checkpoint import Checkpoint
    from kadr.checkpoints.detect.upscaler import MODEL_KIND
    from kadr.checkpoints.text_encoder import TextEncoderCheckpoint

    described = Checkpoint.open(path).describe()
    found = {"path": str(path), "family": "LTX-Video", **asdict(described)}
    found["parts"] = list(found["parts"])
    if described.kind != MODEL_KIND:
        return found, _format_upscaler(found)
    if TEXT_ENCODER not in described.missing_components:
        home = path if path.is_dir() else path.parent
        found["parts"].append(asdict(TextEncoderCheckpoint.open(home).describe()))
    return found, _format_checkpoint(found)


def _format_checkpoint(found: Mapping[str, Any]) -> Iterator[str]:
    name = f" ({found['model']})" if found["model"] else ""
    yield f"{found['family']} {found['version']}{name}, {found['layout']}"
    yield f"VAE of {found['vae_family'] or 'its own kind'}, noise levels by {found['sampler']}"
    yield from _format_components(found["parts"])
    for part in found["missing"]:
        yield f"missing: {part} ({REMEDIES.get(part, 'give it beside this one')})"


def _format_upscaler(found: Mapping[str, Any]) -> Iterator[str]:
    name = f" ({found['model']})" if found["model"] else ""
    yield f"{found['family']} {found['version']} {found['kind']}{name}, {found['layout']}"
    yield "for --upscaler, beside a model"
    yield from _format_components(found["parts"])


def _format_components(components: list[dict[str, Any]]) -> Iterator[str]:
    rows = [("part", "tensors", "numbers", "bytes", "dtype", "sizes")]
    for part in components:
        sizes = ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in part["sizes"].items())
        counts = (str(part["tensors"]), format_si(part["parameters"]), format_si(part["bytes"]))
        rows.append((part["name"], *counts, _format_dtype(part), sizes))
    yield from format_columns(rows)


def _format_dtype(component: Mapping[str, Any]) -> str:
    """What most of a part is stored as; where some is in blocks, each type with its number of tensors."""
    types: Mapping[str, int] = component["types"]
    packed = any(name in GGML_TYPES for name in types)
    return ", ".join(f"{name} ({count})" for name, count in types.items()) if packed else str(component["dtype"])
