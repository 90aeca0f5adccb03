"""Checks the layers that ComfyUI's mixed precision marks as quantized.

A marked layer `x` has `x.weight`, `x.weight_scale` and a format, stated by a JSON object: the bytes of the tensor
`x.comfy_quant`, or an entry of `_quantization_metadata` in the header (ComfyUI's QUANTIZATION.md). kadr reads the fp8
formats, whose weights are multiplied by their scale as those of `fp8_scales`; any other is refused by its name,
because its weights would come out wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from kadr.checkpoints.fp8_scales import COMFY_QUANT_SUFFIX
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError

FORMATS: Mapping[str, torch.dtype] = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
HEADER_KEY = "_quantization_metadata"
_FORMAT_ENTRY = "format"
_HARMLESS_ENTRIES = {_FORMAT_ENTRY, "full_precision_matrix_mult"}  # the second chooses a kernel, not the weights
_MAX_MARKER_BYTES, _MAX_QUOTED = 4096, 60
_WAY_OUT = "Use the bf16 file of the same model, one in fp8, or a .gguf."


def check_quantized_layers(source: Source, prefixes: Iterable[str] = ("",)) -> None:
    """Checks that kadr reads every marked layer of a file exactly.

    Args:
        prefixes: prefixes of the file's keys that the layers' names in the header may lack.

    Raises:
        CheckpointError: a layer is in another format, or lacks what its format needs.
    """
    for layer, config in _marked_layers(source):
        if not isinstance(config, Mapping) or not isinstance(config.get(_FORMAT_ENTRY), str):
            raise _layer_error(source, layer, f"a mark that is not a format: {_quote(config)}")
        if config[_FORMAT_ENTRY] not in FORMATS:
            raise _layer_error(source, layer, f"the format {_quote(config[_FORMAT_ENTRY])}")
        if unknown := sorted(str(entry) for entry in config if entry not in _HARMLESS_ENTRIES):
            raise _layer_error(source, layer, f"{_quote(unknown[0])} in its mark")
        stem = next((prefix + layer for prefix in prefixes if f"{prefix}{layer}.weight" in source.infos), None)
        if stem is None:
            raise _layer_error(source, layer, "a mark and no weight")
        _check_tensors(source, stem, config[_FORMAT_ENTRY])


def _check_tensors(source: Source, layer: str, format_name: str) -> None:
    """Checks dtype and scale of a marked layer's weight."""
    weight, scale = source.infos[f"{layer}.weight"], source.infos.get(f"{layer}.weight_scale")
    if weight.dtype != FORMATS[format_name]:
        raise _layer_error(source, layer, f"the format {format_name!r} and a weight in {weight.storage_type}")
    if scale is None:
        raise _layer_error(source, layer, f"the format {format_name!r} and no weight_scale")
    if scale.numel not in (1, weight.shape[0]):
        raise _layer_error(source, layer, f"a weight_scale of {scale.numel} values for {weight.shape[0]} rows")


def _marked_layers(source: Source) -> Iterator[tuple[str, Any]]:
    """Yields the marked layers and their marks, those of the header first."""
    if HEADER_KEY in source.metadata:
        header = _parse(source, HEADER_KEY, source.metadata[HEADER_KEY])
        layers = header.get("layers") if isinstance(header, Mapping) else None
        if not isinstance(layers, Mapping):
            raise CheckpointError(f"{source.path}: {HEADER_KEY} in its header has no layers. {_WAY_OUT}")
        yield from layers.items()
    for name, info in source.infos.items():
        if name.endswith(COMFY_QUANT_SUFFIX):
            if info.size_bytes > _MAX_MARKER_BYTES:
                raise CheckpointError(
                    f"{source.path}: the mark {_quote(name)} has {info.size_bytes:,} bytes, more than the "
                    f"{_MAX_MARKER_BYTES:,} of any format. {_WAY_OUT}"
                )
            text = source.read(name).flatten().view(torch.uint8).numpy().tobytes()
            yield name.removesuffix(COMFY_QUANT_SUFFIX), _parse(source, name, text)


def _parse(source: Source, name: str, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{source.path}: the mark {_quote(name)} is not JSON. Use the file as released."
        ) from error


def _layer_error(source: Source, layer: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{source.path} is in ComfyUI's mixed precision, and its layer {_quote(layer)} has {problem}; kadr reads "
        f"{' and '.join(FORMATS)} with their scale. {_WAY_OUT}"
    )


def _quote(value: object) -> str:
    """Returns a value from the file, escaped and cut."""
    text = repr(value)
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."
