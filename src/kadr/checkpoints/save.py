"""Modules into files: the official single files, and a text encoder's folder. Written beside, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from kadr.checkpoints.header import LENGTH_BYTES
from kadr.checkpoints.header import SAFETENSORS_DTYPES as STORED_DTYPES
from kadr.checkpoints.keys import T5_KEYS, TRANSFORMER_KEYS, UPSCALER_KEYS, Key, map_keys
from kadr.checkpoints.keys import VAE_KEYS as VAE_KEYS
from kadr.errors import CheckpointError
from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import Transformer
from kadr.models.upscaler import LatentUpscaler
from kadr.models.vae import VAE
from kadr.sampling.schedules import Schedule

Materialize = Callable[[str, Tensor], Tensor]
_DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
_HEADER_ALIGNMENT = 8  # bytes: where the tensors start, so that they can be mapped


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
    """Write a checkpoint in the official layout, with its config in the header.

    Args:
        transformer, vae: on any device; at least one of them.
        dtype: that every tensor is stored in.
        materialize: see `write_tensors`.
        metadata: more entries of the header, beside "config".

    Raises:
        CheckpointError: the file cannot be written.
    """
    config: dict[str, Any] = {"scheduler": schedule.to_header()}
    if schedule.allowed_sigmas is not None:
        config["allowed_inference_steps"] = list(schedule.allowed_sigmas)
    tensors: dict[str, Tensor] = {}
    if transformer is not None:
        config["transformer"] = transformer.config.to_header()
        tensors |= _tensors_by_file_key(transformer, TRANSFORMER_KEYS, "model.diffusion_model.")
    if vae is not None:
        config["vae"] = vae.config.to_header()
        tensors |= _tensors_by_file_key(vae, VAE_KEYS, "vae.")
    if not tensors:
        raise ValueError("give a transformer, a VAE or both")
    described = {**(metadata or {}), "config": json.dumps(config)}
    write_tensors(Path(path), tensors, dtype=dtype, metadata=described, materialize=materialize)


def write_upscaler(
    path: str | os.PathLike[str],
    upscaler: LatentUpscaler,
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an upscaler in the official layout, with its config in the header. As `write_single_file`.

    Args:
        dtype: float32, as the released ones are stored, unless said otherwise.
    """
    described = {**(metadata or {}), "config": json.dumps(upscaler.config.to_header())}
    write_tensors(Path(path), _tensors_by_file_key(upscaler, UPSCALER_KEYS, ""), dtype=dtype, metadata=described)


def write_text_encoder(
    folder: str | os.PathLike[str],
    text_encoder: T5Encoder,
    tokenizer_file: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    materialize: Materialize | None = None,
) -> None:
    """Write `text_encoder` and `tokenizer` into a folder, as transformers and `TextEncoderCheckpoint` read them.

    Args:
        folder: made if absent.
        tokenizer_file: spiece.model or tokenizer.json; it is copied under that name.
        materialize: see `write_tensors`.

    Raises:
        CheckpointError: the files cannot be written.
    """
    home, tokenizer_file = Path(folder), Path(tokenizer_file)
    for made in (home / "text_encoder", home / "tokenizer"):
        made.mkdir(parents=True, exist_ok=True)
    write_tensors(
        home / "text_encoder" / "model.safetensors",
        _tensors_by_file_key(text_encoder, T5_KEYS, ""),
        dtype=dtype,
        materialize=materialize,
    )
    _write_json(home / "text_encoder" / "config.json", _t5_config_json(text_encoder.config, dtype))
    name = "tokenizer.json" if tokenizer_file.suffix == ".json" else "spiece.model"
    with _atomic_file(home / "tokenizer" / name) as file, tokenizer_file.open("rb") as given:
        shutil.copyfileobj(given, file)
    _write_json(home / "tokenizer" / "tokenizer_config.json", _TOKENIZER_CONFIG)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    metadata: Mapping[str, str] | None = None,
    materialize: Materialize | None = None,
    fsync: bool = False,
) -> None:
    """Write a safetensors file, one tensor at a time: no second copy of the model is made.

    The same tensors give the same bytes.

    Args:
        fsync: wait until the disk has it, so that a power cut leaves it whole or as it was before.
        materialize: gives the numbers of a tensor, by its name, when its turn has come; `tensors` may then be on meta.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in sorted(tensors.items()):
        start, end = end, end + prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % _HEADER_ALIGNMENT)
    with _atomic_file(path, fsync=fsync) as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little"))
        file.write(text)
        for name, tensor in sorted(tensors.items()):
            tensor = tensor if materialize is None else materialize(name, tensor)
            plain = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
            file.write(plain.view(torch.uint8).numpy().data)


def _tensors_by_file_key(module: nn.Module, table: tuple[Key, ...], prefix: str) -> dict[str, Tensor]:
    state = module.state_dict()
    return {prefix + theirs: state[ours] for ours, theirs in map_keys(table, state).items()}


def _t5_config_json(config: T5Config, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of transformers' T5EncoderModel."""
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
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


# Without sentinels: the vocabulary is that of the file.
_TOKENIZER_CONFIG: Mapping[str, Any] = {
    "tokenizer_class": "T5Tokenizer",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "extra_ids": 0,
    "model_max_length": 512,
}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with _atomic_file(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


@contextmanager
def _atomic_file(path: Path, *, fsync: bool = False) -> Iterator[BinaryIO]:
    """A file that takes its name only when it is whole."""
    with atomic_path(path) as part, part.open("wb") as file:
        yield file
        if fsync:
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A place to write a file to, which takes its name only when the block ends well, and else is gone.

    Raises:
        CheckpointError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}. Write it elsewhere.") from error
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
