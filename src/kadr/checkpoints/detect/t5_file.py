"""Detects the T5 encoder in a .safetensors file without config: a file of its own, or a part of a model's file.

ComfyUI's files of T5 v1.1 XXL, such as t5xxl_fp16.safetensors, have transformers' keys; in a checkpoint that holds
everything the keys have a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kadr.checkpoints.comfy_quant import check_quantized_layers
from kadr.checkpoints.header import TensorInfo
from kadr.checkpoints.keys import T5_UNUSED_KEYS, TEXT_ENCODER_PREFIX
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from kadr.models.registry import DEFAULT_TEXT_ENCODER, TEXT_ENCODER_GGUF
from kadr.models.t5 import T5Config

PREFIXES = ("", f"{TEXT_ENCODER_PREFIX}transformer.", "t5xxl.transformer.")
_FIRST_KEY = "encoder.block.0.layer.0.SelfAttention.q.weight"  # of any T5
_COMFY_UNUSED_KEYS = {"logit_scale"}  # ComfyUI gives every text encoder one; T5 does not use it
_EXAMPLES = (
    "Give an encoder as --text-encoder, such as t5xxl_fp16.safetensors, or a name: "
    f"{DEFAULT_TEXT_ENCODER}, {TEXT_ENCODER_GGUF}."
)


def find_t5_prefix(infos: Mapping[str, TensorInfo]) -> str | None:
    """Returns the prefix of the T5 encoder's keys in a file; None if it has no T5 encoder."""
    return next((prefix for prefix in PREFIXES if prefix + _FIRST_KEY in infos), None)


def open_t5_file(path: Path) -> tuple[T5Config, Source]:
    """Reads the header of a file with a T5 encoder.

    Returns:
        The config, from the shapes of the tensors, and the encoder's tensors under transformers' keys.

    Raises:
        CheckpointError: it has none, or not one of T5 v1.1's architecture.
    """
    source = Source.open(path)
    prefix = find_t5_prefix(source.infos)
    if prefix is None:
        example = next(iter(source.infos), "no tensor at all")
        raise CheckpointError(f"{path} has no T5 text encoder in it, but {example!r:.80}. {_EXAMPLES}")
    check_quantized_layers(source, PREFIXES)
    names = {name.removeprefix(prefix): name for name in source.infos if name.startswith(prefix)}
    encoder = source.rename_tensors({key: name for key, name in names.items() if key not in _COMFY_UNUSED_KEYS})
    return _config_from_shapes(encoder), encoder


def _config_from_shapes(source: Source) -> T5Config:
    """Derives the config; what no shape tells, as the longest distance, is the same in all of T5 v1.1."""
    infos = source.infos
    if "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in infos:
        raise _architecture_error(source, "umT5: each of its blocks has a position bias of its own")
    if "encoder.block.0.layer.1.DenseReluDense.wi.weight" in infos:
        raise _architecture_error(source, "the first T5: its feed-forward has no gate")
    vocab_size, d_model = _matrix(source, "shared.weight", *T5_UNUSED_KEYS)
    attention = "encoder.block.0.layer.0.SelfAttention"
    num_buckets, num_heads = _matrix(source, f"{attention}.relative_attention_bias.weight")
    inner_width, _ = _matrix(source, f"{attention}.q.weight")
    d_ff, _ = _matrix(source, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
    if not num_heads or inner_width % num_heads:
        raise _architecture_error(source, f"of {num_heads} heads, which do not divide its attention of {inner_width}")
    try:
        return T5Config(
            vocab_size=vocab_size,
            d_model=d_model,
            num_layers=len({name.split(".")[2] for name in infos if name.startswith("encoder.block.")}),
            num_heads=num_heads,
            d_kv=inner_width // num_heads,
            d_ff=d_ff,
            relative_attention_num_buckets=num_buckets,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from error


def _matrix(source: Source, *names: str) -> tuple[int, int]:
    """Returns rows and columns of the first of some matrices that is there."""
    shape = next((source.infos[name].shape for name in names if name in source.infos), ())
    if len(shape) != 2:
        raise _architecture_error(source, f"a part of one: it has no matrix {names[0]}")
    return shape[0], shape[1]


def _architecture_error(source: Source, kind: str) -> CheckpointError:
    return CheckpointError(f"{source.path} is not an encoder of T5 v1.1 but {kind}. {_EXAMPLES}")
