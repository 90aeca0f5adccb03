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


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def shapes(module: nn.Module) -> Shapes:
    return {name: tuple(weight.shape) for name, weight in module.state_dict().items()}


def translated(ours: nn.Module, table: Any, **layout: Any) -> Shapes:
    """Their names with our shapes; every one of our tensors must get a name of its own."""
    names = keys.map_keys(table, ours.state_dict(), **layout)
    assert list(names) == list(ours.state_dict())
    assert len(set(names.values())) == len(names)
    return {names[name]: shape for name, shape in shapes(ours).items()}


@pytest.fixture(scope="module", params=VAES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def vae(family: str) -> nn.Module:
    return on_meta(lambda: VAE(VAES[family]))


@pytest.fixture(scope="module", params=TRANSFORMERS)
def size(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def transformer(size: str) -> nn.Module:
    return on_meta(lambda: Transformer(TRANSFORMERS[size]))


# Total, shapes included


def test_every_tensor_of_the_official_vae_is_named_once_with_its_shape(vae, family):
    expected = shapes(official_vae_on_meta(VAES[family]))
    for module, file in (("mean_of_means", "mean-of-means"), ("std_of_means", "std-of-means")):
        expected[f"per_channel_statistics.{file}"] = expected.pop(module)  # as its loader renames them
    assert translated(vae, keys.VAE_KEYS) == expected


def test_every_tensor_of_the_diffusers_vae_is_named_once_with_its_shape(vae, family):
    expected = shapes(diffusers_vae_on_meta(VAES[family], family))
    assert translated(vae, keys.VAE_KEYS, diffusers=True, diffusers_family=family) == expected


def test_every_tensor_of_the_official_transformer_is_named_once_with_its_shape(transformer, size):
    expected = shapes(official_transformer_on_meta(TRANSFORMERS[size]))
    assert translated(transformer, keys.TRANSFORMER_KEYS) == expected


def test_every_tensor_of_the_diffusers_transformer_is_named_once_with_its_shape(transformer, size):
    expected = shapes(diffusers_transformer_on_meta(TRANSFORMERS[size]))
    assert translated(transformer, keys.TRANSFORMER_KEYS, diffusers=True) == expected


def test_every_tensor_of_the_text_encoder_is_named_once_with_its_shape():
    config = transformers.T5Config(
        vocab_size=32128, d_model=4096, num_layers=24, num_heads=64, d_kv=64, d_ff=10240, feed_forward_proj="gated-gelu"
    )
    xxl = T5Config(vocab_size=32128, d_model=4096, num_layers=24, num_heads=64, d_kv=64, d_ff=10240)
    expected = shapes(on_meta(lambda: transformers.T5EncoderModel(config)))
    unused = {name: expected.pop(name) for name in keys.T5_UNUSED_KEYS}
    ours = on_meta(lambda: T5Encoder(xxl))
    assert translated(ours, keys.T5_KEYS) == translated(ours, keys.T5_KEYS, diffusers=True) == expected
    assert unused == {"encoder.embed_tokens.weight": expected["shared.weight"]}


@pytest.mark.parametrize("space, time", [(True, False), (False, True), (True, True)])
def test_every_tensor_of_the_upscaler_is_named_once_with_its_shape_in_both_layouts(space, time):
    ours = on_meta(lambda: LatentUpscaler(UpscalerConfig(spatial_upsample=space, temporal_upsample=time)))
    official = on_meta(lambda: OfficialUpsampler(spatial_upsample=space, temporal_upsample=time))
    diffusers = on_meta(lambda: LTXLatentUpsamplerModel(spatial_upsample=space, temporal_upsample=time))
    assert translated(ours, keys.UPSCALER_KEYS) == shapes(official)
    assert translated(ours, keys.UPSCALER_KEYS, diffusers=True) == shapes(diffusers)


# Against names written down elsewhere


def test_the_two_layouts_of_the_transformer_differ_as_the_official_package_says(transformer):
    official = keys.map_keys(keys.TRANSFORMER_KEYS, transformer.state_dict())
    diffusers = keys.map_keys(keys.TRANSFORMER_KEYS, transformer.state_dict(), is_diffusers=True)
    for ours, name in diffusers.items():
        for theirs, renamed in TRANSFORMER_KEYS_RENAME_DICT.items():
            name = name.replace(theirs, renamed)
        assert name == official[ours]


def test_the_two_layouts_of_the_first_vae_differ_as_the_official_package_says():
    ours = on_meta(lambda: VAE(VAES["0.9"])).state_dict()
    official = keys.map_keys(keys.VAE_KEYS, ours)
    for name, theirs in keys.map_keys(keys.VAE_KEYS, ours, is_diffusers=True, diffusers_vae_family="0.9").items():
        for old, new in VAE_KEYS_RENAME_DICT.items():
            theirs = theirs.replace(old, new)
        assert theirs == official[name]


@pytest.mark.parametrize(
    "family, ours, official, diffusers",
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
def test_a_name_is_as_published(family, ours, official, diffusers):
    assert ours in on_meta(lambda: VAE(VAES[family])).state_dict()
    assert keys.map_keys(keys.VAE_KEYS, [ours]) == {ours: official}
    assert keys.map_keys(keys.VAE_KEYS, [ours], is_diffusers=True, diffusers_vae_family=family) == {ours: diffusers}


# Sizes


@pytest.mark.parametrize(
    "size, parameters, in_a_layer, outside_of_layers",
    [("2B", 1_923_385_472, 67_155_968, 43_018_368), ("13B", 13_042_569_344, 268_529_664, 153_145_472)],
)
def test_a_released_transformer_has_the_published_count_of_parameters(size, parameters, in_a_layer, outside_of_layers):
    model = on_meta(lambda: Transformer(TRANSFORMERS[size]))
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert sum(weight.numel() for weight in model.layers[0].parameters()) == in_a_layer
    assert parameters == in_a_layer * len(model.layers) + outside_of_layers


@pytest.mark.parametrize(
    "family, encoder, decoder, tensors",
    [("0.9", 180.4, 238.8, 188), ("0.9.1", 180.4, 754.6, 292), ("0.9.5", 694.1, 552.8, 224)],
)
def test_a_released_vae_has_the_published_count_of_parameters_and_tensors(family, encoder, decoder, tensors):
    model = on_meta(lambda: VAE(VAES[family]))
    millions = [sum(weight.numel() for weight in half.parameters()) / 1e6 for half in (model.encoder, model.decoder)]
    assert millions == pytest.approx([encoder, decoder], abs=0.05)
    assert len(model.encoder.state_dict()) + len(model.decoder.state_dict()) == tensors


# What the tables do not know


@pytest.mark.parametrize(
    "table, name",
    [
        (keys.TRANSFORMER_KEYS, "proj_in"),
        (keys.TRANSFORMER_KEYS, "proj_in.scale"),
        (keys.TRANSFORMER_KEYS, "blocks.x.scale_shift_table"),
        (keys.TRANSFORMER_KEYS, "blocks.0.self_attention.q.weight.extra"),
        (keys.TRANSFORMER_KEYS, "prefix.proj_in.weight"),
        (keys.TRANSFORMER_KEYS, "layersX0Xmodulation"),  # a dot is a dot
        (keys.VAE_KEYS, "encoder.blocks.0.res_blocks.0.conv3.weight"),
        (keys.VAE_KEYS, "statistics.median"),
        (keys.VAE_KEYS, "middle.conv_in.weight"),
        (keys.VAE_KEYS, ""),
        (keys.T5_KEYS, "blocks.0.attention.w.weight"),
        (keys.UPSCALER_KEYS, "res_blocks.0.conv3.weight"),
    ],
)
def test_an_unknown_name_raises(table, name):
    with pytest.raises(KeyError, match=name or "''"):
        keys.map_keys(table, [name])
