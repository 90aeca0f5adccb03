"""Converts a transformer or a text encoder to a self-contained GGUF file: config, schedule, tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.detect.single_file import read_header_config
from kadr.checkpoints.detect.vae_families import VAE_FAMILIES
from kadr.checkpoints.fp8_scales import apply_weight_scale, find_weight_scales
from kadr.checkpoints.gguf.header import CONFIG_KEY, LTXV_ARCHITECTURE, NAME_KEY, T5_ENCODER_ARCHITECTURE, is_gguf
from kadr.checkpoints.gguf.origins import ComponentOrigin
from kadr.checkpoints.gguf.t5_fields import read_gguf_pieces, text_encoder_fields
from kadr.checkpoints.gguf.writer import OutputTensor, WriteWatch, write_gguf
from kadr.checkpoints.keys import T5_GGUF_KEYS, T5_UNUSED_KEYS, TRANSFORMER_KEYS, map_keys
from kadr.checkpoints.load import account
from kadr.checkpoints.source import Source
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import CheckpointError
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.quant.mixes import Mix, assign_types
from kadr.regular_file import read_bytes
from kadr.schema import GGUF
from kadr.text.sentencepiece_model import SentencePieceModel, parse_sentencepiece
from kadr.text.tokenizer import MAX_TOKENIZER_BYTES, find_tokenizer_file
from kadr.validation import refuse_overwriting_source

QUANTIZATION_VERSION = 2  # llama.cpp's version of the block layouts
GGUF_T5_MAX_DISTANCE = 128  # T5's relative_attention_max_distance, for which the format has no field
# Storage type -> GGUF type of a tensor that is not quantized. All others become BF16, which fp8 values fit into.
_UNQUANTIZED_TYPES = {"float32": "F32", "float16": "F16"}
_EMBEDDING_KEY = "embedding.weight"


@dataclass(frozen=True)
class ConversionResult:
    """Bytes of the tensors before and after a conversion, and GGUF type -> number of tensors."""

    source_bytes: int
    output_bytes: int
    type_counts: Mapping[str, int]


def transformer_to_gguf(
    checkpoint: Checkpoint,
    path: Path,
    mix: Mix,
    *,
    origins: Mapping[str, ComponentOrigin] | None = None,
    watch: WriteWatch = lambda done, of: None,
) -> ConversionResult:
    """Writes the transformer of a checkpoint to a GGUF file.

    Args:
        origins: field -> origin of a component that is not in the file; see `spec.origins.component_origins`.

    Raises:
        CheckpointError: it has none, is quantized already, or see `write_gguf`.
    """
    config = checkpoint.info.transformer
    if config is None:
        raise checkpoint.missing_component_error("transformer")
    source_key_by_output_key = _map_transformer_keys(checkpoint, config)
    release = checkpoint.info.release
    fields = {NAME_KEY: release.name} if release else {}
    fields[CONFIG_KEY] = json.dumps(_complete_config(checkpoint))
    for field, origin in (origins or {}).items():
        fields |= origin.to_fields(field)
    source = checkpoint.sources["transformer"]
    return _convert(path, LTXV_ARCHITECTURE, mix, fields, source, source_key_by_output_key, watch)


def _map_transformer_keys(checkpoint: Checkpoint, config: TransformerConfig) -> dict[str, str]:
    """Maps key in the GGUF file -> key in the source, whose tensors it checks against the transformer's."""
    with torch.device("meta"):
        module = Transformer(config)
    kadr_keys = list(module.state_dict())
    source_keys = map_keys(TRANSFORMER_KEYS, kadr_keys, is_diffusers=checkpoint.info.layout == "diffusers")
    account(module, checkpoint.sources["transformer"], source_keys)
    output_keys = map_keys(TRANSFORMER_KEYS, kadr_keys)
    return {output_key: source_keys[kadr_key] for kadr_key, output_key in output_keys.items()}


def text_encoder_to_gguf(
    text_encoder: TextEncoderCheckpoint, path: Path, mix: Mix, *, watch: WriteWatch = lambda done, of: None
) -> ConversionResult:
    """Writes a text encoder with its tokenizer to a GGUF file.

    Raises:
        CheckpointError: it is quantized already, has no tokenizer that can be written, or see `write_gguf`.
    """
    max_distance = text_encoder.config.relative_attention_max_distance
    if max_distance != GGUF_T5_MAX_DISTANCE:
        raise CheckpointError(
            f"{text_encoder.path} has relative_attention_max_distance = {max_distance}; readers of GGUF files assume "
            f"{GGUF_T5_MAX_DISTANCE}. Use this encoder as it is."
        )
    with torch.device("meta"):
        module = T5Encoder(text_encoder.config)
    kadr_keys = list(module.state_dict())
    source_keys = map_keys(text_encoder.key_table, kadr_keys)
    (tied_key,) = T5_UNUSED_KEYS
    if source_keys[_EMBEDDING_KEY] not in text_encoder.source.infos and tied_key in text_encoder.source.infos:
        source_keys[_EMBEDDING_KEY] = tied_key
    account(module, text_encoder.source, source_keys, ignored_keys=T5_UNUSED_KEYS)
    fields = text_encoder_fields(text_encoder.config, _find_pieces(text_encoder))
    source_key_by_output_key = {
        output_key: source_keys[kadr_key] for kadr_key, output_key in map_keys(T5_GGUF_KEYS, kadr_keys).items()
    }
    return _convert(path, T5_ENCODER_ARCHITECTURE, mix, fields, text_encoder.source, source_key_by_output_key, watch)


def _convert(
    path: Path,
    architecture: str,
    mix: Mix,
    fields: Mapping[str, Any],
    source: Source,
    source_keys: Mapping[str, str],
    watch: WriteWatch,
) -> ConversionResult:
    """Writes the tensors and fields of a component.

    Args:
        source_keys: key in the GGUF file -> key in the source.
    """
    refuse_overwriting_source(path, (info.file for info in source.infos.values()))
    _refuse_quantized(source)
    infos = {name: source.infos[source_key] for name, source_key in source_keys.items()}
    rules = mix.text_encoder if architecture == T5_ENCODER_ARCHITECTURE else mix.transformer
    types = assign_types(
        mix,
        rules,
        {name: (info.shape, _UNQUANTIZED_TYPES.get(info.storage_type, "BF16")) for name, info in infos.items()},
    )
    scales = find_weight_scales(source.infos, source_keys.values())
    entries = [
        OutputTensor(
            name,
            infos[name].shape,
            types[name],
            partial(_read_dequantized, source, source_key, scales.get(source_key)),
        )
        for name, source_key in source_keys.items()
    ]
    type_fields = {"general.quantization_version": QUANTIZATION_VERSION, "general.file_type": mix.file_type}
    write_gguf(path, architecture, GGUF.stamp({**type_fields, **fields}), entries, watch=watch)
    source_bytes = sum(info.size_bytes for info in infos.values())
    return ConversionResult(source_bytes, sum(entry.size_bytes for entry in entries), Counter(types.values()))


def _read_dequantized(source: Source, source_key: str, scale_key: str | None) -> Tensor:
    weight = source.read(source_key)
    return weight if scale_key is None else apply_weight_scale(weight, source.read(scale_key), torch.float32)


def _refuse_quantized(source: Source) -> None:
    quantized = next((info for info in source.infos.values() if info.ggml_type is not None), None)
    if quantized is not None:
        raise CheckpointError(
            f"{source.path} is quantized already ({quantized.name} is in {quantized.storage_type}); quantizing it "
            "again loses precision twice. Use the bf16 file of the model."
        )


def _complete_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the config in the official header, completed with what detection found."""
    info = checkpoint.info
    header_config = read_header_config(checkpoint.sources["transformer"])
    assert info.transformer is not None
    vae = info.vae or VAE_FAMILIES.get(info.vae_family or "")
    detected_config: dict[str, Any] = {
        "transformer": info.transformer.to_header(),
        "scheduler": info.schedule.to_header(),
    }
    if vae is not None:
        detected_config["vae"] = vae.to_header()
    if info.schedule.allowed_sigmas is not None:
        detected_config["allowed_inference_steps"] = list(info.schedule.allowed_sigmas)
    return {**detected_config, **header_config}


def _find_pieces(text_encoder: TextEncoderCheckpoint) -> SentencePieceModel:
    """Returns the tokenizer's pieces, from the encoder's GGUF file or its spiece.model."""
    text_encoder.load_tokenizer()  # refuses a tokenizer that does not fit
    if is_gguf(text_encoder.path) and (stored := read_gguf_pieces(text_encoder.path)) is not None:
        return stored
    file = find_tokenizer_file(text_encoder.tokenizer_path or text_encoder.tokenizer_root)
    if file.suffix == ".json":
        raise CheckpointError(
            f"the tokenizer of {text_encoder.tokenizer_root} is {file}, but a GGUF file needs the pieces of a "
            f"spiece.model. Put that of google/t5-v1_1-xxl into {file.parent}."
        )
    try:
        return parse_sentencepiece(read_bytes(file, MAX_TOKENIZER_BYTES))
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be written into a GGUF file: {error}. Download it again.") from error
