"""`kadr inspect`: describes a file from its header."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kadr.cli.flags import options
from kadr.cli.terminal.errors import print_stdout
from kadr.cli.terminal.output import print_lines
from kadr.cli.terminal.table import format_columns, format_si
from kadr.errors import CheckpointError
from kadr.kernels.ggml_types import GGML_TYPES
from kadr.media.encoders.formats import FORMATS_BY_SUFFIX
from kadr.schema import VIDEO_METADATA, upgrade_video_metadata
from kadr.validation import expand_home

VIDEO_SUFFIXES = {".mov", ".m4v", ".mkv", ".avi", *FORMATS_BY_SUFFIX}
TEXT_ENCODER = "text encoder"
MAX_UNEXPECTED_KEYS = 20  # unexpected keys of a LoRA that are listed; --json has all
REMEDIES = {
    "transformer": "give a checkpoint with one as --model, and this one as --vae",
    "vae": "give a checkpoint with one as --vae",
    TEXT_ENCODER: "fetched from the hub, or give a file or a folder as --text-encoder",
}
Target = Annotated[
    str,
    typer.Argument(
        metavar="NAME|PATH",
        help="A .safetensors, a .gguf, a folder, or a video that kadr made; or a name of `kadr models`.",
        show_default=False,
    ),
]


def inspect(
    target: Target,
    release: options.Release = None,
    models_dir: options.ModelsDir = None,
    as_json: options.Json = False,
) -> None:
    """Describe a file.

    For a checkpoint: version, components and missing components, from the header alone. For a LoRA: the layers it
    adapts, and the model it fits. For a video: its request, and its schema number.
    """
    path = _find(target, models_dir or ())
    if path.suffix.lower() in VIDEO_SUFFIXES:
        description, lines = _video(path)
    else:
        description, lines = _weights(path, release)
    if as_json:
        print_stdout(json.dumps(description))
    else:
        print_lines(lines)


def _find(name_or_path: str, models_dirs: Sequence[str]) -> Path:
    """Returns the path of a file by its path or name.

    Raises:
        RequestError, CheckpointError: as `locate_file`; or a release is not on disk.
    """
    from kadr.spec.locate import find_release_on_disk, locate_file
    from kadr.spec.model_folders import ModelFolders

    if (video := expand_home(name_or_path)).suffix.lower() in VIDEO_SUFFIXES:
        return video
    path, release = locate_file(name_or_path, ModelFolders.open(models_dirs))
    if release is not None:
        path = find_release_on_disk(release)
    if path is None:
        raise CheckpointError(f"{name_or_path} is not on disk. `kadr models pull {name_or_path}` fetches it.")
    return path


def _video(path: Path) -> tuple[dict[str, Any], Iterator[str]]:
    from kadr.media.clip import read_metadata

    stored = read_metadata(path)
    upgrade_video_metadata(stored, path)  # refuses what a newer kadr wrote
    record = {VIDEO_METADATA.key: VIDEO_METADATA.read_number(stored, path), **stored}
    return record, _fields(record)


def _fields(record: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yields one line per entry; entries that are None are skipped."""
    width = max(map(len, record), default=0)
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}"
            yield from _fields(value, indent + "  ")
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            yield f"{indent}{name:<{width}}  {text}"


def _weights(path: Path, release: str | None) -> tuple[dict[str, Any], Iterator[str]]:
    from kadr.checkpoints.lora.file import is_lora
    from kadr.checkpoints.text_encoder import is_text_encoder

    if is_text_encoder(path):
        return _text_encoder(path)
    return _lora(path) if is_lora(path) else _checkpoint(path, release)


def _text_encoder(path: Path) -> tuple[dict[str, Any], Iterator[str]]:
    from kadr.checkpoints.text_encoder import TextEncoderCheckpoint

    component = asdict(TextEncoderCheckpoint.open(path).describe())
    description = {"path": str(path), "family": "T5", "components": [component]}
    return description, iter(("T5 text encoder", *_format_components([component])))


def _lora(path: Path) -> tuple[dict[str, Any], Iterator[str]]:
    from kadr.checkpoints.lora.file import LoraFile

    # allow_partial: unexpected keys are listed, not refused.
    description = {"kind": "LoRA", **asdict(LoraFile.open(path, allow_partial=True).describe())}
    return description, _format_lora(description)


def _format_lora(description: Mapping[str, Any]) -> Iterator[str]:
    model = f" for {description['model_size']}" if description["model_size"] else ""
    yield f"LTX-Video LoRA{model}, key format: {description['key_format']}"
    ranks, alphas, scales = (
        ", ".join(f"{value:g}" for value in description[name]) for name in ("ranks", "alphas", "scales")
    )
    yield f"rank {ranks}, alpha {alphas or 'the same'}; scale {scales} at strength 1"
    yield (
        f"{description['num_adapted_layers']} layers in {description['num_adapted_blocks']} blocks, "
        f"{format_si(description['size_bytes'])}B in {description['dtype']}"
    )
    yield from format_columns(
        [("layer", "count"), *((name, str(count)) for name, count in description["target_counts"].items())]
    )
    if description["reference_downscale"]:
        factor = description["reference_downscale"]
        yield f"in-context LoRA: its control has the size of the video{f' divided by {factor}' if factor > 1 else ''}"
    yield from _format_unexpected_keys(description["unexpected_keys"])
    yield from _fields(description["metadata"])


def _format_unexpected_keys(names: Sequence[str]) -> Iterator[str]:
    for name in names[:MAX_UNEXPECTED_KEYS]:
        yield f"unexpected key: {name}"
    if len(names) > MAX_UNEXPECTED_KEYS:
        yield f"unexpected keys: {len(names) - MAX_UNEXPECTED_KEYS} more"


def _checkpoint(path: Path, release: str | None) -> tuple[dict[str, Any], Iterator[str]]:
    from kadr.checkpoints.checkpoint import Checkpoint
    from kadr.checkpoints.detect.upscaler import MODEL_KIND
    from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
    from kadr.models.registry import find_model_release

    checkpoint = Checkpoint.open(path, release=None if release is None else find_model_release(release))
    info = checkpoint.describe()
    description = {"path": str(path), "family": "LTX-Video", **asdict(info)}
    description["components"] = list(description["components"])
    if info.kind != MODEL_KIND:
        return description, _format_upscaler(description)
    if TEXT_ENCODER not in info.missing_components:
        folder = path if path.is_dir() or checkpoint.holds_text_encoder else path.parent
        description["components"].append(asdict(TextEncoderCheckpoint.open(folder).describe()))
    return description, _format_checkpoint(description)


def _format_checkpoint(description: Mapping[str, Any]) -> Iterator[str]:
    name = f" ({description['registry_name']})" if description["registry_name"] else ""
    yield f"{description['family']} {description['version']}{name}, {description['layout']}"
    if description["release_candidates"]:
        yield f"release: one of {', '.join(description['release_candidates'])}; pass the one it is with --release"
    yield f"VAE of {description['vae_family'] or 'no released family'}, sigmas by {description['sampler']}"
    yield from _format_components(description["components"])
    for component in description["missing_components"]:
        origin = description["origins"].get(component)
        remedy = f"taken from {origin}" if origin else REMEDIES.get(component, "give it beside this one")
        yield f"missing: {component} ({remedy})"


def _format_upscaler(description: Mapping[str, Any]) -> Iterator[str]:
    name = f" ({description['registry_name']})" if description["registry_name"] else ""
    yield f"{description['family']} {description['version']} {description['kind']}{name}, {description['layout']}"
    yield "for --upscaler, beside a model"
    yield from _format_components(description["components"])


def _format_components(components: list[dict[str, Any]]) -> Iterator[str]:
    rows = [("component", "tensors", "parameters", "bytes", "dtype", "sizes")]
    for component in components:
        sizes = ", ".join(f"{name} {number}" for name, number in component["sizes"].items())
        counts = (
            str(component["num_tensors"]),
            format_si(component["num_parameters"]),
            format_si(component["size_bytes"]),
        )
        rows.append((component["name"], *counts, _format_dtype(component), sizes))
    yield from format_columns(rows)


def _format_dtype(component: Mapping[str, Any]) -> str:
    """Names the storage type of most bytes; with block-quantized tensors, every type and its number of tensors."""
    type_counts: Mapping[str, int] = component["type_counts"]
    if any(name in GGML_TYPES for name in type_counts):
        return ", ".join(f"{name} ({count})" for name, count in type_counts.items())
    return str(component["dtype"])
