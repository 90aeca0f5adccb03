"""GGUF files for tests, written with the gguf package as others write them, and not by the code under test."""

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
# As the package packs itself.
QUANTS_OF_THE_PACKAGE = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def write_gguf_file(
    path: Path,
    architecture: str,
    tensors: Mapping[str, tuple[np.ndarray, str]],
    fields: Mapping[str, Any] | None = None,
) -> Path:
    """A whole file. tensors: name -> float32 numbers, and the type to store them as."""
    writer = _writer(architecture, fields or {})
    for name, (numbers, kind) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(numbers, Type[kind]), raw_dtype=Type[kind])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_sparse_gguf(
    path: Path, architecture: str, tensors: Mapping[str, tuple[tuple[int, ...], str]], **fields: Any
) -> Path:
    """A whole file of zeros that takes no room on the disk. tensors: name -> shape, and type."""
    writer = _writer(architecture, fields)
    end = 0
    for name, (shape, kind) in tensors.items():
        numbers, size = gguf.GGML_QUANT_SIZES[Type[kind]]
        stored = (*shape[:-1], shape[-1] // numbers * size)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), prod(stored), Type[kind])
        end = -(-end // ALIGNMENT) * ALIGNMENT + prod(stored)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // ALIGNMENT) * ALIGNMENT + end)
    return path


def transformer_types(shapes: Shapes, kind: str, *, outer_type: str = "BF16") -> dict[str, tuple[tuple[int, ...], str]]:
    """What the published files of this family store a transformer's tensors as, in a type without a mix."""
    made = {}
    for name, shape in shapes.items():
        exact = len(shape) == 1 or prod(shape) <= 1024 or "scale_shift_table" in name
        around = any(word in name for word in ("adaln_single.", "caption_projection.", "patchify_proj.", "proj_out."))
        made[name] = (shape, "F32" if exact else outer_type if around else kind)
    return made


def t5_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """The tensors of an encoder, as llama.cpp's converter names them."""
    inner, wide = config.num_heads * config.d_kv, config.d_model
    made: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab_size, wide),
        "enc.blk.0.attn_rel_b.weight": (config.relative_attention_num_buckets, config.num_heads),
        "enc.output_norm.weight": (wide,),
    }
    for layer in range(config.num_layers):
        own = {
            "attn_norm": (wide,),
            **{f"attn_{x}": (inner, wide) for x in "qkv"},
            "attn_o": (wide, inner),
            "ffn_norm": (wide,),
            "ffn_gate": (config.d_ff, wide),
            "ffn_up": (config.d_ff, wide),
            "ffn_down": (wide, config.d_ff),
        }
        made |= {f"enc.blk.{layer}.{name}.weight": shape for name, shape in own.items()}
    return made


def t5_fields(config: T5Config, spiece: bytes | None = None) -> dict[str, Any]:
    """The values that llama.cpp's converter writes for an encoder, and with a SentencePiece model its tokenizer."""
    sizes = {
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
    made = {f"t5encoder.{name}": value for name, value in sizes.items()}
    return made if spiece is None else made | tokenizer_fields(spiece, config.vocab_size)


def tokenizer_fields(spiece: bytes, vocabulary: int, added_tokens: Mapping[str, int] | None = None) -> dict[str, Any]:
    """As `set_vocab` of the converter does it. added: what added_tokens.json says."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    model = protobuf.ModelProto.FromString(spiece)
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    tokens, scores, kinds = [f"[PAD{i}]" for i in range(vocabulary)], [-10000.0] * vocabulary, [5] * vocabulary
    for i in range(processor.get_piece_size()):
        tokens[i], scores[i] = processor.id_to_piece(i), processor.get_score(i)
        asked = {2: processor.is_unknown, 3: processor.is_control, 5: processor.is_unused, 6: processor.is_byte}
        kinds[i] = next((kind for kind, holds in asked.items() if holds(i)), 1)
    for token, i in (added_tokens or {}).items():
        tokens[i], scores[i], kinds[i] = token, -1000.0, 4
    rules = model.normalizer_spec
    made = {
        "model": "t5",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": kinds,
        "add_space_prefix": rules.add_dummy_prefix,
        "remove_extra_whitespaces": rules.remove_extra_whitespaces,
        "eos_token_id": 1,
        "padding_token_id": 0,
    }
    if rules.precompiled_charsmap:
        made["precompiled_charsmap"] = rules.precompiled_charsmap
    return {f"tokenizer.ggml.{name}": value for name, value in made.items()}


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
