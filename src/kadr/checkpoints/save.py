"""Saves modules to files: official single files, and a text encoder's folder; each is written atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kadr.atomic_write import atomic_file, write_json
from kadr.checkpoints.header import LENGTH_BYTES, SAFETENSORS_DTYPES
from kadr.checkpoints.keys import (
    T5_KEYS,
    TRANSFORMER_KEYS,
    TRANSFORMER_PREFIX,
    UPSCALER_KEYS,
    VAE_KEYS,
    VAE_PREFIX,
    Key,
    map_keys,
)
from kadr.errors import CheckpointError
from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.models.upscaler import LatentUpscaler
from kadr.models.vae import VAE, VAEConfig
from kadr.sampling.schedules import Schedule

Materialize = Callable[[str, Tensor], Tensor]
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_HEADER_ALIGNMENT = 8  # bytes; the tensors start at a multiple, so that they can be mapped
_T5_CONSTANTS = {  # what the config.json of every T5 v1.1 encoder has
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def write_single_file(
    path: str | os.PathLike[str],
    *,
    transformer: Transformer | None = None,
    vae: VAE | None = None,
    schedule: Schedule,
    dtype: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, str] | None = None,
    materialize: Materialize | None = None,
) -> None:
    """Writes a checkpoint in the official layout, with its config in the header.

    Args:
        transformer, vae: on any device; at least one of them.
        dtype: storage dtype of every tensor.
        materialize: see `write_tensors`.
        metadata: further entries of the header, besides "config".

    Raises:
        CheckpointError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    if transformer is not None:
        tensors |= tensors_by_file_key(transformer, TRANSFORMER_KEYS, TRANSFORMER_PREFIX)
    if vae is not None:
        tensors |= tensors_by_file_key(vae, VAE_KEYS, VAE_PREFIX)
    if not tensors:
        raise ValueError("give a transformer, a VAE or both")
    config = single_file_config(transformer and transformer.config, vae and vae.config, schedule)
    full_metadata = {**(metadata or {}), "config": json.dumps(config)}
    write_tensors(Path(path), tensors, dtype=dtype, metadata=full_metadata, materialize=materialize)


def single_file_config(
    transformer: TransformerConfig | None, vae: VAEConfig | None, schedule: Schedule
) -> dict[str, Any]:
    """Returns the config in the header of an official single file."""
    config: dict[str, Any] = {"scheduler": schedule.to_header()}
    if schedule.allowed_sigmas is not None:
        config["allowed_inference_steps"] = list(schedule.allowed_sigmas)
    if transformer is not None:
        config["transformer"] = transformer.to_header()
    if vae is not None:
        config["vae"] = vae.to_header()
    return config


def write_upscaler(
    path: str | os.PathLike[str],
    upscaler: LatentUpscaler,
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes an upscaler in the official layout, with its config in the header; see `write_single_file`.

    Args:
        dtype: the released upscalers are stored in float32, the default.
    """
    full_metadata = {**(metadata or {}), "config": json.dumps(upscaler.config.to_header())}
    write_tensors(Path(path), tensors_by_file_key(upscaler, UPSCALER_KEYS), dtype=dtype, metadata=full_metadata)


def write_text_encoder(
    folder: str | os.PathLike[str],
    text_encoder: T5Encoder,
    tokenizer_file: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    materialize: Materialize | None = None,
) -> None:
    """Writes `text_encoder` and `tokenizer` into a folder, as transformers and `TextEncoderCheckpoint` read them.

    Args:
        folder: created if absent.
        tokenizer_file: a SentencePiece model or a tokenizer.json; copied as spiece.model or tokenizer.json.
        materialize: see `write_tensors`.

    Raises:
        CheckpointError: the files cannot be written.
    """
    home, tokenizer_file = Path(folder), Path(tokenizer_file)
    for subfolder in (home / "text_encoder", home / "tokenizer"):
        subfolder.mkdir(parents=True, exist_ok=True)
    write_tensors(
        home / "text_encoder" / "model.safetensors",
        tensors_by_file_key(text_encoder, T5_KEYS),
        dtype=dtype,
        materialize=materialize,
    )
    write_json(home / "text_encoder" / "config.json", _t5_config_json(text_encoder.config, dtype))
    name = "tokenizer.json" if tokenizer_file.suffix == ".json" else "spiece.model"
    with atomic_file(home / "tokenizer" / name) as file, tokenizer_file.open("rb") as source:
        shutil.copyfileobj(source, file)
    write_json(home / "tokenizer" / "tokenizer_config.json", _TOKENIZER_CONFIG)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None = None,
    materialize: Materialize | None = None,
    fsync: bool = False,
) -> None:
    """Writes a safetensors file, one tensor at a time, without a second copy of the model.

    The same tensors give the same bytes.

    Args:
        dtype: of every tensor; None keeps the dtype of each.
        fsync: wait until the file is on disk, so that a power cut leaves the new file or the old one.
        materialize: (name, tensor) -> the tensor's values, called when it is written; `tensors` may then be on meta.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in sorted(tensors.items()):
        stored_dtype = dtype or tensor.dtype
        start, end = end, end + prod(tensor.shape) * stored_dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[stored_dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header_bytes = json.dumps(header, separators=(",", ":")).encode()
    header_bytes += b" " * (-(LENGTH_BYTES + len(header_bytes)) % _HEADER_ALIGNMENT)
    with atomic_file(path, fsync=fsync) as file:
        file.write(len(header_bytes).to_bytes(LENGTH_BYTES, "little"))
        file.write(header_bytes)
        for name, tensor in sorted(tensors.items()):
            tensor = tensor if materialize is None else materialize(name, tensor)
            flat = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def tensors_by_file_key(module: nn.Module, table: tuple[Key, ...], prefix: str = "") -> dict[str, Tensor]:
    """Returns the tensors of a module by their keys in the official file."""
    state = module.state_dict()
    return {prefix + file_key: state[kadr_key] for kadr_key, file_key in map_keys(table, state).items()}


def _t5_config_json(config: T5Config, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the config.json of transformers' T5EncoderModel."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        **_T5_CONSTANTS,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


# extra_ids 0: no sentinel tokens besides the vocabulary of the file.
_TOKENIZER_CONFIG: Mapping[str, Any] = {
    "tokenizer_class": "T5Tokenizer",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "extra_ids": 0,
    "model_max_length": 512,
}


def check_disk_space(path: Path, size: int) -> None:
    """Refuses to write a file or folder of `size` bytes where it does not fit.

    Raises:
        CheckpointError: there is no folder for it, or not enough space.
    """
    if not path.parent.is_dir():
        raise CheckpointError(
            f"{path} cannot be written: there is no folder {path.parent}. Create it, or write elsewhere."
        )
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise CheckpointError(
            f"{path} will take {size / 1e6:,.0f} MB, and its disk has {free / 1e6:,.0f} MB free. Free some, or write "
            "elsewhere."
        )
