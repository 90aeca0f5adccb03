"""GGUF files for tests, written with the gguf package as other tools write them, not by the code under test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
from gguf import GGMLQuantizationType as Type

from kadr.models.t5 import T5Config

Shapes = Mapping[str, tuple[int, ...]]
ALIGNMENT = 32
# Block types that the gguf package itself quantizes to.
QUANTS_OF_THE_PACKAGE = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def write_gguf_file(
    path: Path,
    architecture: str,
    tensors: Mapping[str, tuple[np.ndarray, str]],
    fields: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a complete file.

    Args:
        tensors: name -> float32 values, and the type to store them as.
    """
    writer = _writer(architecture, fields or {})
    for name, (values, type_name) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(values, Type[type_name]), raw_dtype=Type[type_name])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_sparse_gguf(
    path: Path, architecture: str, tensors: Mapping[str, tuple[tuple[int, ...], str]], **fields: Any
) -> Path:
    """Writes a sparse file of zeros, which takes no disk space.

    Args:
        tensors: name -> shape, and type.
    """
    writer = _writer(architecture, fields)
    end = 0
    for name, (shape, type_name) in tensors.items():
        block_size, type_size = gguf.GGML_QUANT_SIZES[Type[type_name]]
        storage_shape = (*shape[:-1], shape[-1] // block_size * type_size)
        writer.add_tensor_info(name, storage_shape, np.dtype(np.uint8), prod(storage_shape), Type[type_name])
        end = -(-end // ALIGNMENT) * ALIGNMENT + prod(storage_shape)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // ALIGNMENT) * ALIGNMENT + end)
    return path


def transformer_types(
    shapes: Shapes, block_type: str, *, outer_type: str = "BF16"
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the types of a transformer's tensors in the published files of this family, without a mix."""
    types = {}
    for name, shape in shapes.items():
        is_exact = len(shape) == 1 or prod(shape) <= 1024 or "scale_shift_table" in name
        is_outer = any(word in name for word in ("adaln_single.", "caption_projection.", "patchify_proj.", "proj_out."))
        types[name] = (shape, "F32" if is_exact else outer_type if is_outer else block_type)
    return types


def t5_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Returns the keys and shapes of an encoder, as llama.cpp's converter names them."""
    inner, width = config.num_heads * config.d_kv, config.d_model
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab_size, width),
        "enc.blk.0.attn_rel_b.weight": (config.relative_attention_num_buckets, config.num_heads),
        "enc.output_norm.weight": (width,),
    }
    for block in range(config.num_layers):
        block_shapes = {
            "attn_norm": (width,),
            **{f"attn_{x}": (inner, width) for x in "qkv"},
            "attn_o": (width, inner),
            "ffn_norm": (width,),
            "ffn_gate": (config.d_ff, width),
            "ffn_up": (config.d_ff, width),
            "ffn_down": (width, config.d_ff),
        }
        shapes |= {f"enc.blk.{block}.{name}.weight": shape for name, shape in block_shapes.items()}
    return shapes


def t5_fields(config: T5Config, spiece: bytes | None = None) -> dict[str, Any]:
    """Returns the fields that llama.cpp's converter writes for an encoder and, with `spiece`, for its tokenizer."""
    config_fields = {
        "context_length": 512,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "block_count": config.num_layers,
        "attention.head_count": config.num_heads,
        "attention.key_length": config.d_kv,
        "attention.value_length": config.d_kv,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        "attention.relative_buckets_count": config.relative_attention_num_buckets,
        "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
    }
    fields = {f"t5encoder.{name}": value for name, value in config_fields.items()}
    return fields if spiece is None else fields | tokenizer_fields(spiece, config.vocab_size)


def tokenizer_fields(spiece: bytes, vocab_size: int, added_tokens: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Returns the fields of a tokenizer, like `set_vocab` of llama.cpp's converter.

    Args:
        added_tokens: content of added_tokens.json.
    """
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    model = protobuf.ModelProto.FromString(spiece)
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    tokens, scores, types = [f"[PAD{i}]" for i in range(vocab_size)], [-10000.0] * vocab_size, [5] * vocab_size
    predicates = {2: processor.is_unknown, 3: processor.is_control, 5: processor.is_unused, 6: processor.is_byte}
    for i in range(processor.get_piece_size()):
        tokens[i], scores[i] = processor.id_to_piece(i), processor.get_score(i)
        types[i] = next((token_type for token_type, is_of_type in predicates.items() if is_of_type(i)), 1)
    for token, i in (added_tokens or {}).items():
        tokens[i], scores[i], types[i] = token, -1000.0, 4
    normalizer = model.normalizer_spec
    fields = {
        "model": "t5",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "add_space_prefix": normalizer.add_dummy_prefix,
        "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "eos_token_id": 1,
        "padding_token_id": 0,
    }
    if normalizer.precompiled_charsmap:
        fields["precompiled_charsmap"] = normalizer.precompiled_charsmap
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def _writer(architecture: str, fields: Mapping[str, Any]) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(None, architecture)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in fields.items():
        if type(value) in add:
            add[type(value)](name, value)
        else:
            assert isinstance(value, Sequence)
            writer.add_array(name, value)
    return writer
