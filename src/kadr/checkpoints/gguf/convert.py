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
from kadr.checkpoints.detect.single_file import header_config
from kadr.checkpoints.detect.vae_families import VAE_FAMILIES
from kadr.checkpoints.fp8_scales import scaled, scales_of
from kadr.checkpoints.gguf.header import CONFIG, NAME, TEXT_ENCODER, TRANSFORMER, is_gguf
from kadr.checkpoints.gguf.t5_fields import stored_pieces, text_fields
from kadr.checkpoints.gguf.writer import Entry, Watch, write_gguf
from kadr.checkpoints.keys import T5_GGUF, T5_UNUSED, names
from kadr.checkpoints.keys import TRANSFORMER as TRANSFORMER_KEYS
from kadr.checkpoints.load import account
from kadr.checkpoints.source import Source
from kadr.checkpoints.text_encoder import TextEncoderFolder
from kadr.errors import CheckpointError
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer
from kadr.quant.mixes import Mix, assign_types
from kadr.text.sentencepiece_model import SentencePieceModel, parse_sentencepiece
from kadr.text.tokenizer import find_tokenizer_file

QUANTIZATION_VERSION = 2  # of the layouts of blocks, as llama.cpp counts them
MAX_DISTANCE = 128  # of T5's positions: the one size that the format has no word for
_KEPT = {"float32": "F32", "float16": "F16"}  # what is stored otherwise is kept as BF16: 8-bit floats fit into it
_EMBEDDING = "embedding.weight"


@dataclass(frozen=True)
class Written:
    """What came of it: bytes of the tensors before and after, and what they are stored as -> how many."""

    before: int
    after: int
    types: Mapping[str, int]


def transformer_to_gguf(
    checkpoint: Checkpoint, path: Path, mix: Mix, *, watch: Watch = lambda done, of: None
) -> Written:
    """Write the transformer of a checkpoint.

    Raises:
        CheckpointError: it has none, is quantized already, or see `write_gguf`.
    """
    config = checkpoint.detected.transformer
    if config is None:
        raise checkpoint.lacks("transformer")
    with torch.device("meta"):
        module = Transformer(config)
    ours = list(module.state_dict())
    source = checkpoint.sources["transformer"]
    wanted = names(TRANSFORMER_KEYS, ours, diffusers=checkpoint.detected.layout == "diffusers")
    account(module, source, wanted)
    released = checkpoint.detected.released
    fields = {NAME: released.name} if released else {}
    fields[CONFIG] = json.dumps(_described(checkpoint))
    places = {name: wanted[own] for own, name in names(TRANSFORMER_KEYS, ours).items()}
    return _write(path, TRANSFORMER, mix, fields, source, places, watch)


def text_encoder_to_gguf(
    text: TextEncoderFolder, path: Path, mix: Mix, *, watch: Watch = lambda done, of: None
) -> Written:
    """Write a text encoder with its tokenizer.

    Raises:
        CheckpointError: it is quantized already, has no tokenizer that can be written, or see `write_gguf`.
    """
    if text.config.relative_attention_max_distance != MAX_DISTANCE:
        raise CheckpointError(
            f"{text.path} tells distances apart up to {text.config.relative_attention_max_distance} tokens; of a GGUF file everyone takes "
            f"it to be {MAX_DISTANCE}. Leave this encoder as it is."
        )
    with torch.device("meta"):
        module = T5Encoder(text.config)
    ours = list(module.state_dict())
    wanted = names(text.table, ours)
    (second,) = T5_UNUSED
    if wanted[_EMBEDDING] not in text.source.infos and second in text.source.infos:
        wanted[_EMBEDDING] = second
    account(module, text.source, wanted, known_unused=T5_UNUSED)
    fields = text_fields(text.config, _pieces(text))
    places = {name: wanted[own] for own, name in names(T5_GGUF, ours).items()}
    return _write(path, TEXT_ENCODER, mix, fields, text.source, places, watch)


def _write(
    path: Path,
    architecture: str,
    mix: Mix,
    fields: Mapping[str, Any],
    source: Source,
    places: Mapping[str, str],
    watch: Watch,
) -> Written:
    """places: name in the file -> name in the source."""
    _refuse_packed(source)
    infos = {name: source.infos[theirs] for name, theirs in places.items()}
    rules = mix.text_encoder if architecture == TEXT_ENCODER else mix.transformer
    types = assign_types(
        mix, rules, {name: (info.shape, _KEPT.get(info.stored, "BF16")) for name, info in infos.items()}
    )
    scales = scales_of(source.infos, places.values())
    entries = [
        Entry(name, infos[name].shape, types[name], partial(_plain, source, theirs, scales.get(theirs)))
        for name, theirs in places.items()
    ]
    said = {"general.quantization_version": QUANTIZATION_VERSION, "general.file_type": mix.file_type}
    write_gguf(path, architecture, {**said, **fields}, entries, watch=watch)
    before, after = sum(info.bytes for info in infos.values()), sum(entry.bytes for entry in entries)
    return Written(before, after, Counter(types.values()))


def _plain(source: Source, name: str, scale: str | None) -> Tensor:
    weight = source.read(name)
    return weight if scale is None else scaled(weight, source.read(scale), torch.float32)


def _refuse_packed(source: Source) -> None:
    packed = next((info for info in source.infos.values() if info.packing is not None), None)
    if packed is not None:
        raise CheckpointError(
            f"{source.path} is quantized already ({packed.name} is in {packed.stored}), and a quantized file of a "
            "quantized one loses twice. Take the bf16 file of the model."
        )


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    """The official header's config, and what it leaves open filled in with what was found out."""
    detected = checkpoint.detected
    config = header_config(checkpoint.sources["transformer"])
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


def _pieces(text: TextEncoderFolder) -> SentencePieceModel:
    text.tokenizer()  # refuses one that does not fit
    if is_gguf(text.path) and (stored := stored_pieces(text.path)) is not None:
        return stored
    file = find_tokenizer_file(text.home)
    if file.suffix == ".json":
        raise CheckpointError(
            f"the tokenizer of {text.home} is {file}, and a GGUF file takes the pieces of a spiece.model. Put that of "
            f"google/t5-v1_1-xxl into {file.parent}."
        )
    try:
        return parse_sentencepiece(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be put into a GGUF file: {error}. Download it again.") from error
