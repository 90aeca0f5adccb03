"""A transformer or a text encoder into a GGUF file that says all of itself: sizes, schedule, tokenizer."""

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
from kadr.checkpoints.gguf.t5_fields import read_gguf_pieces, text_encoder_fields
from kadr.checkpoints.gguf.writer import OutputTensor, WriteWatch, write_gguf
from kadr.checkpoints.keys import T5_GGUF_KEYS, T5_UNUSED_KEYS, map_keys
from kadr.checkpoints.keys import TRANSFORMER_KEYS as TRANSFORMER_KEYS
from kadr.checkpoints.load import account
from kadr.checkpoints.source import Source
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import CheckpointError
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer
from kadr.quant.mixes import Mix, assign_types
from kadr.text.sentencepiece_model import SentencePieceModel, parse_sentencepiece
from kadr.text.tokenizer import find_tokenizer_file

QUANTIZATION_VERSION = 2  # of the layouts of blocks, as llama.cpp counts them
MAX_DISTANCE = 128  # of T5's positions: the one size that the format has no word for
_UNQUANTIZED_TYPES = {
    "float32": "F32",
    "float16": "F16",
}  # what is stored otherwise is kept as BF16: 8-bit floats fit into it
_EMBEDDING_KEY = "embedding.weight"


@dataclass(frozen=True)
class ConversionResult:
    """What came of it: bytes of the tensors before and after, and what they are stored as -> how many."""

    source_bytes: int
    output_bytes: int
    type_counts: Mapping[str, int]


def transformer_to_gguf(
    checkpoint: Checkpoint, path: Path, mix: Mix, *, watch: WriteWatch = lambda done, of: None
) -> ConversionResult:
    """Write the transformer of a checkpoint.

    Raises:
        CheckpointError: it has none, is quantized already, or see `write_gguf`.
    """
    config = checkpoint.info.transformer
    if config is None:
        raise checkpoint.missing_component_error("transformer")
    with torch.device("meta"):
        module = Transformer(config)
    ours = list(module.state_dict())
    source = checkpoint.sources["transformer"]
    wanted = map_keys(TRANSFORMER_KEYS, ours, is_diffusers=checkpoint.info.layout == "diffusers")
    account(module, source, wanted)
    released = checkpoint.info.release
    fields = {NAME_KEY: released.name} if released else {}
    fields[CONFIG_KEY] = json.dumps(_complete_config(checkpoint))
    places = {name: wanted[own] for own, name in map_keys(TRANSFORMER_KEYS, ours).items()}
    return _convert(path, LTXV_ARCHITECTURE, mix, fields, source, places, watch)


def text_encoder_to_gguf(
    text_encoder: TextEncoderCheckpoint, path: Path, mix: Mix, *, watch: WriteWatch = lambda done, of: None
) -> ConversionResult:
    """Write a text encoder with its tokenizer.

    Raises:
        CheckpointError: it is quantized already, has no tokenizer that can be written, or see `write_gguf`.
    """
    if text_encoder.config.relative_attention_max_distance != MAX_DISTANCE:
        raise CheckpointError(
            f"{text_encoder.path} tells distances apart up to {text_encoder.config.relative_attention_max_distance} tokens; of a GGUF file everyone takes "
            f"it to be {MAX_DISTANCE}. Leave this encoder as it is."
        )
    with torch.device("meta"):
        module = T5Encoder(text_encoder.config)
    ours = list(module.state_dict())
    wanted = map_keys(text_encoder.key_table, ours)
    (second,) = T5_UNUSED_KEYS
    if wanted[_EMBEDDING_KEY] not in text_encoder.source.infos and second in text_encoder.source.infos:
        wanted[_EMBEDDING_KEY] = second
    account(module, text_encoder.source, wanted, ignored_keys=T5_UNUSED_KEYS)
    fields = text_encoder_fields(text_encoder.config, _find_pieces(text_encoder))
    places = {name: wanted[own] for own, name in map_keys(T5_GGUF_KEYS, ours).items()}
    return _convert(path, T5_ENCODER_ARCHITECTURE, mix, fields, text_encoder.source, places, watch)


def _convert(
    path: Path,
    architecture: str,
    mix: Mix,
    fields: Mapping[str, Any],
    source: Source,
    source_keys: Mapping[str, str],
    watch: WriteWatch,
) -> ConversionResult:
    """places: name in the file -> name in the source."""
    _refuse_quantized(source)
    infos = {name: source.infos[theirs] for name, theirs in source_keys.items()}
    rules = mix.text_encoder if architecture == T5_ENCODER_ARCHITECTURE else mix.transformer
    types = assign_types(
        mix,
        rules,
        {name: (info.shape, _UNQUANTIZED_TYPES.get(info.storage_type, "BF16")) for name, info in infos.items()},
    )
    scales = find_weight_scales(source.infos, source_keys.values())
    entries = [
        OutputTensor(
            name, infos[name].shape, types[name], partial(_read_dequantized, source, theirs, scales.get(theirs))
        )
        for name, theirs in source_keys.items()
    ]
    said = {"general.quantization_version": QUANTIZATION_VERSION, "general.file_type": mix.file_type}
    write_gguf(path, architecture, {**said, **fields}, entries, watch=watch)
    before, after = sum(info.size_bytes for info in infos.values()), sum(entry.size_bytes for entry in entries)
    return ConversionResult(before, after, Counter(types.values()))


def _read_dequantized(source: Source, name: str, scale: str | None) -> Tensor:
    weight = source.read(name)
    return weight if scale is None else apply_weight_scale(weight, source.read(scale), torch.float32)


def _refuse_quantized(source: Source) -> None:
    packed = next((info for info in source.infos.values() if info.ggml_type is not None), None)
    if packed is not None:
        raise CheckpointError(
            f"{source.path} is quantized already ({packed.name} is in {packed.storage_type}), and a quantized file of a "
            "quantized one loses twice. Take the bf16 file of the model."
        )


def _complete_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The official header's config, and what it leaves open filled in with what was found out."""
    detected = checkpoint.info
    config = read_header_config(checkpoint.sources["transformer"])
    assert detected.transformer is not None
    vae = detected.vae or VAE_FAMILIES.get(detected.vae_family or "")
    found: dict[str, Any] = {
        "transformer": detected.transformer.to_header(),
        "scheduler": detected.schedule.to_header(),
    }
    if vae is not None:
        found["vae"] = vae.to_header()
    if detected.schedule.allowed_sigmas is not None:
        found["allowed_inference_steps"] = list(detected.schedule.allowed_sigmas)
    return {**found, **config}


def _find_pieces(text_encoder: TextEncoderCheckpoint) -> SentencePieceModel:
    text_encoder.load_tokenizer()  # refuses one that does not fit
    if is_gguf(text_encoder.path) and (stored := read_gguf_pieces(text_encoder.path)) is not None:
        return stored
    file = find_tokenizer_file(text_encoder.tokenizer_root)
    if file.suffix == ".json":
        raise CheckpointError(
            f"the tokenizer of {text_encoder.tokenizer_root} is {file}, and a GGUF file takes the pieces of a spiece.model. Put that of "
            f"google/t5-v1_1-xxl into {file.parent}."
        )
    try:
        return parse_sentencepiece(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be put into a GGUF file: {error}. Download it again.") from error
