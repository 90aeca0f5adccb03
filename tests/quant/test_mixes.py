"""GGUF types of tensors: transformers as in the published files of this family, text encoders as in llama.cpp."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import gguf
import pytest

from kadr.kernels.ggml_types import GGML_TYPES
from kadr.models.t5 import T5Config
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B
from kadr.quant.mixes import FALLBACK_TYPES, FLOAT_TYPES, MIX_ALIASES, MIX_NAMES, MIXES, assign_types, find_mix
from tests.checkpoints.checkpoint_files import single_file_shapes
from tests.checkpoints.gguf import gguf_files

XXL = T5Config(vocab_size=32128, d_model=4096, num_layers=24, num_heads=64, d_kv=64, d_ff=10240)
# For 24 layers: the first and the last eighth, and every third between.
MORE_BITS_LAYERS = {0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23}


def transformer_types(name: str, layers: int = 28) -> dict[str, str]:
    shapes = single_file_shapes({28: TRANSFORMER_2B, 48: TRANSFORMER_13B}[layers], without_prefix=True)
    mix = find_mix(name)
    return assign_types(mix, mix.transformer, {tensor: (shape, "BF16") for tensor, shape in shapes.items()})


def text_encoder_types(name: str) -> dict[str, str]:
    mix = find_mix(name)
    return assign_types(mix, mix.text_encoder, {tensor: (s, "BF16") for tensor, s in gguf_files.t5_shapes(XXL).items()})


def layers_with_type(types: dict[str, str], leaf: str, type_name: str) -> set[int]:
    """Returns the layers whose tensor has that type."""
    end = f"{leaf}.weight"
    return {
        int(name.split(".")[2])
        for name, tensor_type in types.items()
        if name.endswith(end) and tensor_type == type_name
    }


def test_file_types_equal_llama_cpps() -> None:
    for mix in MIXES.values():
        expected = gguf.LlamaFileType["ALL_F32" if mix.name == "F32" else f"MOSTLY_{mix.name}"]
        assert mix.file_type == expected
        assert mix.base_type in (*FLOAT_TYPES, *GGML_TYPES)
    assert {name: mix.base_type for name, mix in MIXES.items() if name in GGML_TYPES} == {
        name: name for name in MIXES if name in GGML_TYPES
    }


@pytest.mark.parametrize("name", MIX_NAMES)
def test_mix_names_ignore_case(name: str) -> None:
    assert find_mix(name.lower()) is find_mix(name) is MIXES[MIX_ALIASES.get(name, name)]


def test_an_unknown_mix_is_not_found() -> None:
    with pytest.raises(KeyError):
        find_mix("IQ4_XS")


@pytest.mark.parametrize("name", MIX_NAMES)
def test_tensors_that_are_never_quantized_keep_their_type(name: str) -> None:
    for layers in (28, 48):
        types = transformer_types(name, layers)
        shapes = single_file_shapes({28: TRANSFORMER_2B, 48: TRANSFORMER_13B}[layers], without_prefix=True)
        outer_type = find_mix(name).base_type if find_mix(name).base_type in FLOAT_TYPES else "BF16"
        expected = gguf_files.transformer_types(shapes, "packed", outer_type=outer_type)
        for tensor, (_, type_name) in expected.items():
            assert types[tensor] == type_name or (
                type_name == "packed" and types[tensor] in (*GGML_TYPES, outer_type)
            ), tensor
    text_types = text_encoder_types(name)
    assert {text_types[tensor] for tensor in text_types if "norm" in tensor or "attn_rel_b" in tensor} == {"F32"}


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "Q5_K_S", "Q5_1", "Q4_1", "Q3_K_S"])
def test_a_type_without_overrides_is_uniform(name: str) -> None:
    base = find_mix(name).base_type
    assert set(transformer_types(name).values()) == {base, "F32", "BF16"}
    embedding = "Q8_0" if name == "Q8_0" else "Q6_K"
    assert set(text_encoder_types(name).values()) == {base, "F32", embedding}


# Types of the value projections (two per block), of the feed-forward's down projection, and of the rest of a block.
@pytest.mark.parametrize(
    "name, attn_v, ffn_down, rest",
    [
        ("Q5_K_M", {"Q6_K": 56}, {"Q6_K": 28}, "Q5_K"),
        ("Q5_0", {"Q5_0": 56}, {"Q5_1": 28}, "Q5_0"),
        ("Q4_K_M", {"Q6_K": 56}, {"Q6_K": 28}, "Q4_K"),
        ("Q4_K_S", {"Q5_K": 4, "Q4_K": 52}, {"Q5_K": 28}, "Q4_K"),
        ("Q4_0", {"Q4_0": 56}, {"Q4_1": 28}, "Q4_0"),
        ("Q3_K_L", {"Q5_K": 56}, {"Q5_K": 28}, "Q3_K"),
        ("Q3_K_M", {"Q5_K": 2, "Q4_K": 54}, {"Q4_K": 28}, "Q3_K"),
        ("Q2_K", {"Q3_K": 56}, {"Q2_K": 28}, "Q2_K"),
    ],
)
def test_a_transformer_is_mixed_as_the_published_files(
    name: str, attn_v: dict[str, int], ffn_down: dict[str, int], rest: str
) -> None:
    types = transformer_types(name)
    assert Counter(types[tensor] for tensor in types if tensor.endswith(".to_v.weight")) == attn_v
    assert Counter(types[tensor] for tensor in types if tensor.endswith(".ff.net.2.weight")) == ffn_down
    others = (".to_q.weight", ".to_k.weight", ".to_out.0.weight", ".ff.net.0.proj.weight")
    assert {types[tensor] for tensor in types if tensor.endswith(others)} == {rest}
    first = [tensor for tensor in types if tensor.endswith(".to_v.weight")][: next(iter(attn_v.values()))]
    assert {types[tensor] for tensor in first} == {next(iter(attn_v))}


@pytest.mark.parametrize("name", ["Q4_K_M", "Q5_K_M"])
def test_text_encoder_has_more_bits_at_both_ends_and_every_third(name: str) -> None:
    types = text_encoder_types(name)
    assert layers_with_type(types, "attn_v", "Q6_K") == layers_with_type(types, "ffn_down", "Q6_K") == MORE_BITS_LAYERS
    assert layers_with_type(types, "ffn_up", name[:4]) == layers_with_type(types, "attn_o", name[:4]) == set(range(24))
    assert types["token_embd.weight"] == "Q6_K"


@pytest.mark.parametrize(
    "name, attn_v, ffn_down",
    [
        ("Q4_K_S", {"Q5_K": set(range(4))}, {"Q5_K": set(range(3))}),
        ("Q3_K_M", {"Q5_K": {0, 1}, "Q4_K": set(range(2, 24))}, {"Q5_K": {0}, "Q4_K": set(range(1, 24))}),
        ("Q3_K_L", {"Q5_K": set(range(24))}, {"Q5_K": set(range(24))}),
        ("Q2_K", {"Q3_K": set(range(24))}, {"Q3_K": set(range(24))}),
        ("Q4_0", {"Q4_0": set(range(24))}, {"Q4_0": set(range(24))}),
    ],
)
def test_a_text_encoder_is_mixed_as_llama_cpp_does(
    name: str, attn_v: dict[str, set[int]], ffn_down: dict[str, set[int]]
) -> None:
    types = text_encoder_types(name)
    for leaf, expected in (("attn_v", attn_v), ("ffn_down", ffn_down)):
        assert {type_name: layers_with_type(types, leaf, type_name) for type_name in expected} == expected


@pytest.mark.parametrize("base_type, fallback", FALLBACK_TYPES.items())
def test_rows_that_do_not_fill_blocks_of_256_take_the_fallback(base_type: str, fallback: str) -> None:
    mix = next(mix for mix in MIXES.values() if mix.base_type == base_type)
    tensors = {f"x{columns}": ((64, columns), "F16") for columns in (256, 32, 96, 1000, 24)}
    types = assign_types(mix, mix.transformer, tensors)
    assert types == {"x256": base_type, "x32": fallback, "x96": fallback, "x1000": "F16", "x24": "F16"}


def test_the_types_can_be_listed_without_torch() -> None:
    code = "import sys, kadr.quant.mixes; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "src"})
