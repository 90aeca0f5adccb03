"""The key tables are total in both directions, at every released size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel
from ltx_video.models.autoencoders.latent_upsampler import LatentUpsampler as OfficialUpsampler
from ltx_video.utils.diffusers_config_mapping import TRANSFORMER_KEYS_RENAME_DICT, VAE_KEYS_RENAME_DICT
from torch import nn

from kadr.checkpoints import keys
from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, Transformer, TransformerConfig
from kadr.models.upscaler import LatentUpscaler, UpscalerConfig
from kadr.models.vae import VAE
from tests.oracles import (
    VAES,
    diffusers_transformer_on_meta,
    diffusers_vae_on_meta,
    official_transformer_on_meta,
    official_vae_on_meta,
)

TRANSFORMERS: Mapping[str, TransformerConfig] = {"2B": TRANSFORMER_2B, "13B": TRANSFORMER_13B}
Shapes = dict[str, tuple[int, ...]]


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def shapes(module: nn.Module) -> Shapes:
    return {name: tuple(weight.shape) for name, weight in module.state_dict().items()}


def shapes_by_file_key(module: nn.Module, table: Any, **layout: Any) -> Shapes:
    """Returns file key -> shape of a module; every tensor must get a key of its own."""
    key_map = keys.map_keys(table, module.state_dict(), **layout)
    assert list(key_map) == list(module.state_dict())
    assert len(set(key_map.values())) == len(key_map)
    return {key_map[key]: shape for key, shape in shapes(module).items()}


@pytest.fixture(scope="module", params=VAES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def vae(family: str) -> nn.Module:
    return build_on_meta(lambda: VAE(VAES[family]))


@pytest.fixture(scope="module", params=TRANSFORMERS)
def size(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def transformer(size: str) -> nn.Module:
    return build_on_meta(lambda: Transformer(TRANSFORMERS[size]))


# Completeness, with shapes


def test_official_vae_keys_and_shapes_are_mapped_one_to_one(vae, family):
    expected = shapes(official_vae_on_meta(VAES[family]))
    for attribute, key in (("mean_of_means", "mean-of-means"), ("std_of_means", "std-of-means")):
        expected[f"per_channel_statistics.{key}"] = expected.pop(attribute)  # renamed like this by its loader
    assert shapes_by_file_key(vae, keys.VAE_KEYS) == expected


def test_diffusers_vae_keys_and_shapes_are_mapped_one_to_one(vae, family):
    expected = shapes(diffusers_vae_on_meta(VAES[family], family))
    assert shapes_by_file_key(vae, keys.VAE_KEYS, is_diffusers=True, diffusers_vae_family=family) == expected


def test_official_transformer_keys_and_shapes_are_mapped_one_to_one(transformer, size):
    expected = shapes(official_transformer_on_meta(TRANSFORMERS[size]))
    assert shapes_by_file_key(transformer, keys.TRANSFORMER_KEYS) == expected


def test_diffusers_transformer_keys_and_shapes_are_mapped_one_to_one(transformer, size):
    expected = shapes(diffusers_transformer_on_meta(TRANSFORMERS[size]))
    assert shapes_by_file_key(transformer, keys.TRANSFORMER_KEYS, is_diffusers=True) == expected


def test_text_encoder_keys_and_shapes_are_mapped_one_to_one():
    config = transformers.T5Config(
        vocab_size=32128, d_model=4096, num_layers=24, num_heads=64, d_kv=64, d_ff=10240, feed_forward_proj="gated-gelu"
    )
    xxl = T5Config(vocab_size=32128, d_model=4096, num_layers=24, num_heads=64, d_kv=64, d_ff=10240)
    expected = shapes(build_on_meta(lambda: transformers.T5EncoderModel(config)))
    unused = {name: expected.pop(name) for name in keys.T5_UNUSED_KEYS}
    encoder = build_on_meta(lambda: T5Encoder(xxl))
    assert shapes_by_file_key(encoder, keys.T5_KEYS) == expected
    assert shapes_by_file_key(encoder, keys.T5_KEYS, is_diffusers=True) == expected
    assert unused == {"encoder.embed_tokens.weight": expected["shared.weight"]}


@pytest.mark.parametrize("spatial, temporal", [(True, False), (False, True), (True, True)])
def test_upscaler_keys_and_shapes_are_mapped_one_to_one_in_both_layouts(spatial, temporal):
    axes = {"spatial_upsample": spatial, "temporal_upsample": temporal}
    upscaler = build_on_meta(lambda: LatentUpscaler(UpscalerConfig(**axes)))
    official = build_on_meta(lambda: OfficialUpsampler(**axes))
    diffusers = build_on_meta(lambda: LTXLatentUpsamplerModel(**axes))
    assert shapes_by_file_key(upscaler, keys.UPSCALER_KEYS) == shapes(official)
    assert shapes_by_file_key(upscaler, keys.UPSCALER_KEYS, is_diffusers=True) == shapes(diffusers)


# Against published keys


def test_transformer_layouts_differ_as_in_the_official_rename_dict(transformer):
    official = keys.map_keys(keys.TRANSFORMER_KEYS, transformer.state_dict())
    diffusers = keys.map_keys(keys.TRANSFORMER_KEYS, transformer.state_dict(), is_diffusers=True)
    for key, file_key in diffusers.items():
        for old, new in TRANSFORMER_KEYS_RENAME_DICT.items():
            file_key = file_key.replace(old, new)
        assert file_key == official[key]


def test_0_9_vae_layouts_differ_as_in_the_official_rename_dict():
    state = build_on_meta(lambda: VAE(VAES["0.9"])).state_dict()
    official = keys.map_keys(keys.VAE_KEYS, state)
    diffusers = keys.map_keys(keys.VAE_KEYS, state, is_diffusers=True, diffusers_vae_family="0.9")
    for key, file_key in diffusers.items():
        for old, new in VAE_KEYS_RENAME_DICT.items():
            file_key = file_key.replace(old, new)
        assert file_key == official[key]


@pytest.mark.parametrize(
    "family, key, official, diffusers",
    [
        (
            "0.9.5",
            "decoder.blocks.4.time_embed.linear_1.weight",
            "decoder.up_blocks.4.time_embedder.timestep_embedder.linear_1.weight",
            "decoder.up_blocks.1.time_embedder.timestep_embedder.linear_1.weight",
        ),
        (
            "0.9.5",
            "decoder.blocks.3.conv.weight",
            "decoder.up_blocks.3.conv.conv.weight",
            "decoder.up_blocks.1.upsamplers.0.conv.conv.weight",
        ),
        (
            "0.9",
            "encoder.blocks.1.weight",
            "encoder.down_blocks.1.conv.weight",
            "encoder.down_blocks.0.downsamplers.0.conv.weight",
        ),
        (
            "0.9",
            "encoder.blocks.2.shortcut.weight",
            "encoder.down_blocks.2.conv_shortcut.weight",
            "encoder.down_blocks.0.conv_out.conv_shortcut.conv.weight",
        ),
        (
            "0.9.1",
            "decoder.blocks.2.res_blocks.6.per_channel_scale2",
            "decoder.up_blocks.2.res_blocks.6.per_channel_scale2",
            "decoder.up_blocks.0.resnets.6.per_channel_scale2",
        ),
        ("0.9.1", "decoder.scale_shift_table", "decoder.last_scale_shift_table", "decoder.scale_shift_table"),
    ],
    ids=lambda value: value if len(value) < 6 else "",
)
def test_a_vae_key_is_the_published_one(family, key, official, diffusers):
    assert key in build_on_meta(lambda: VAE(VAES[family])).state_dict()
    assert keys.map_keys(keys.VAE_KEYS, [key]) == {key: official}
    assert keys.map_keys(keys.VAE_KEYS, [key], is_diffusers=True, diffusers_vae_family=family) == {key: diffusers}


# Sizes


@pytest.mark.parametrize(
    "size, parameters, per_block, outside_of_blocks",
    [("2B", 1_923_385_472, 67_155_968, 43_018_368), ("13B", 13_042_569_344, 268_529_664, 153_145_472)],
)
def test_released_transformers_have_the_published_parameter_counts(size, parameters, per_block, outside_of_blocks):
    model = build_on_meta(lambda: Transformer(TRANSFORMERS[size]))
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert sum(weight.numel() for weight in model.blocks[0].parameters()) == per_block
    assert parameters == per_block * len(model.blocks) + outside_of_blocks


@pytest.mark.parametrize(
    "family, encoder, decoder, tensors",
    [("0.9", 180.4, 238.8, 188), ("0.9.1", 180.4, 754.6, 292), ("0.9.5", 694.1, 552.8, 224)],
)
def test_released_vaes_have_the_published_parameter_and_tensor_counts(family, encoder, decoder, tensors):
    model = build_on_meta(lambda: VAE(VAES[family]))
    millions = [sum(weight.numel() for weight in half.parameters()) / 1e6 for half in (model.encoder, model.decoder)]
    assert millions == pytest.approx([encoder, decoder], abs=0.05)
    assert len(model.encoder.state_dict()) + len(model.decoder.state_dict()) == tensors


# Unknown keys


@pytest.mark.parametrize(
    "table, name",
    [
        (keys.TRANSFORMER_KEYS, "proj_in"),
        (keys.TRANSFORMER_KEYS, "proj_in.scale"),
        (keys.TRANSFORMER_KEYS, "blocks.x.scale_shift_table"),
        (keys.TRANSFORMER_KEYS, "blocks.0.self_attention.q.weight.extra"),
        (keys.TRANSFORMER_KEYS, "prefix.proj_in.weight"),
        (keys.TRANSFORMER_KEYS, "blocksX0Xscale_shift_table"),  # a dot is a dot
        (keys.VAE_KEYS, "encoder.blocks.0.res_blocks.0.conv3.weight"),
        (keys.VAE_KEYS, "statistics.median"),
        (keys.VAE_KEYS, "middle.conv_in.weight"),
        (keys.VAE_KEYS, ""),
        (keys.T5_KEYS, "blocks.0.attention.w.weight"),
        (keys.UPSCALER_KEYS, "res_blocks.0.conv3.weight"),
    ],
)
def test_an_unknown_key_raises(table, name):
    with pytest.raises(KeyError, match=name or "''"):
        keys.map_keys(table, [name])
