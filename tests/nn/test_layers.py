"""Timestep embedding, RoPE, norms, attention and modulation against closed forms, official and diffusers layers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.normalization import RMSNorm as OracleRMSNorm
from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed, apply_rotary_emb
from ltx_video.models.autoencoders.causal_video_autoencoder import LayerNorm as OfficialLayerNorm
from ltx_video.models.autoencoders.pixel_norm import PixelNorm
from ltx_video.models.transformers.attention import Attention as OfficialAttention
from torch import Tensor
from torch.nn.functional import silu

from kadr.kernels.reference import pixel_norm_modulate_silu
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, Transformer, TransformerConfig
from kadr.nn.attention import Attention
from kadr.nn.linear import Linear
from kadr.nn.modulation import compute_adaln_params
from kadr.nn.norm import ChannelLayerNorm, RMSNorm, rms_norm
from kadr.nn.rope import Rope, rope_table
from kadr.nn.timestep_embedding import TimestepEmbedding, sinusoidal_embedding
from kadr.sampling.positions import token_positions
from kadr.shapes import LatentGrid
from tests.oracles import official_transformer_on_meta, randn, relative_error
from tests.tiny_models import build_random

MAX_POSITIONS = (20.0, 2048.0, 2048.0)
ONE_POSITION = torch.tensor([9 / 30, 64.0, 96.0]).view(1, 3, 1)


def rope_of(positions: Tensor, width: int) -> Rope:
    return rope_table(positions, width, max_positions=MAX_POSITIONS, theta=10000.0)


def cosine_sine(rope: Rope) -> tuple[Tensor, Tensor]:
    """Returns the table as others have it: cosine and sine for each element (B, N, D), those of a pair being equal."""
    cosine, sine = rope.rotation.repeat_interleave(2, dim=-2).unbind(-1)
    return cosine, sine


def repeat_pairs(*values: float) -> list[float]:
    return [value for value in values for _ in range(2)]


# Timestep embedding


@pytest.mark.parametrize(
    "timestep, dimensions",
    [
        (50.0, [0.964966, -0.827987, 0.999986, -0.262375, 0.560747, 0.005373]),
        (909.4, [-0.090923, -0.386665, 0.995229, -0.995858, -0.92222, 0.097569]),
    ],
)
def test_sinusoid_has_the_published_values(timestep, dimensions):
    row = sinusoidal_embedding(torch.tensor([timestep]))[0]
    assert row.shape == (256,)
    assert row[[0, 1, 127, 128, 129, 255]].tolist() == pytest.approx(dimensions, abs=2e-5)


def test_sinusoid_equals_diffusers():
    timesteps = torch.cat([torch.linspace(0, 1000, 401), torch.tensor([0.03, 999.99])])
    expected = get_timestep_embedding(timesteps, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert (sinusoidal_embedding(timesteps) - expected).abs().max() <= 2e-4  # 1000 radians in fp32 are known to 6e-5
    assert relative_error(sinusoidal_embedding(timesteps), expected) <= 1e-5


@torch.no_grad()
def test_timestep_embedding_rounds_an_fp32_sinusoid_to_the_dtype():
    embedding = build_random(lambda: TimestepEmbedding(32)).to(torch.bfloat16)
    timesteps = torch.tensor([993.7, 50.0])
    embedded = embedding(timesteps, torch.bfloat16)
    expected = embedding.linear_2(silu(embedding.linear_1(sinusoidal_embedding(timesteps).bfloat16())))
    assert embedded.dtype == torch.bfloat16
    assert torch.equal(embedded, expected)


# RoPE


def test_rope_of_the_2b_has_the_published_values():
    cosine, sine = (part[0, 0] for part in cosine_sine(rope_of(ONE_POSITION, 2048)))
    assert cosine.shape == (2048,)
    expected = repeat_pairs(1, 0.047106, 0.098017, 0.14673, 0.005284, 0.057705)
    assert cosine[:12].tolist() == pytest.approx(expected, abs=2e-6)
    expected = repeat_pairs(0, -0.99889, -0.995185, -0.989177, -0.999986, -0.998334)
    assert sine[:12].tolist() == pytest.approx(expected, abs=2e-6)
    assert cosine[-6:].tolist() == pytest.approx(repeat_pairs(1, 0.0003, -0.707), abs=1e-3)


def test_rope_of_the_13b_has_the_published_values():
    cosine, sine = (part[0, 0] for part in cosine_sine(rope_of(ONE_POSITION, 4096)))
    expected = repeat_pairs(1, 1, 0.047106, 0.098017, 0.14673, 0.026374)
    assert cosine[:12].tolist() == pytest.approx(expected, abs=2e-6)
    expected = repeat_pairs(-0.99889, -0.995185, -0.989177, -0.999652)
    assert sine[4:12].tolist() == pytest.approx(expected, abs=2e-6)
    assert sine[:4].tolist() == [0] * 4


@pytest.mark.parametrize(
    "config",
    [TRANSFORMER_2B, TRANSFORMER_13B, TransformerConfig(num_layers=1, num_heads=2, head_dim=20)],
    ids=["2B", "13B", "40"],
)
def test_rope_table_equals_official_and_diffusers(config):
    grids = [token_positions(LatentGrid(16, 3, 4), fps=fps, causal=causal) for fps, causal in ((30, True), (24, False))]
    positions = torch.stack(grids)
    ours = cosine_sine(rope_of(positions, config.width))
    official = official_transformer_on_meta(replace(config, num_layers=1))
    for table, expected in zip(ours, official.precompute_freqs_cis(positions), strict=True):
        assert table.shape == (2, 192, config.width)
        assert (table - expected).abs().max() <= 1e-6
    from_diffusers = LTXVideoRotaryPosEmbed(dim=config.width)(torch.zeros(2, 1), video_coords=positions)
    for table, expected in zip(ours, from_diffusers, strict=True):
        assert (table - expected).abs().max() <= 1e-6


def test_bfloat16_is_rotated_in_fp32_then_rounded():
    x, rope = randn(2, 5, 40), rope_of(torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)), 40)
    assert rope.rotation.dtype == torch.float32
    rotated = rope(x.bfloat16())
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rope(x.bfloat16().float()).bfloat16())


def test_rotation_equals_diffusers():
    x, rope = randn(2, 5, 40), rope_of(torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)), 40)
    expected = apply_rotary_emb(x, cosine_sine(rope))
    assert torch.equal(rope(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(rope(x), expected, rtol=1e-6, atol=1e-6)


def test_rope_rotates_pairs_and_preserves_their_norm():
    angle = torch.tensor([0.3, -1.2])
    x = torch.tensor([1.0, 0.0, 0.0, 2.0])
    rotated = Rope(torch.stack([angle.cos(), angle.sin()], -1)[None, None])(x[None, None])[0, 0]
    expected = [math.cos(0.3), math.sin(0.3), -2 * math.sin(-1.2), 2 * math.cos(-1.2)]
    assert rotated.tolist() == pytest.approx(expected, abs=1e-6)


def test_remainder_of_width_by_six_comes_first_unrotated():
    for width in (36, 38, 40):
        rope = rope_of(ONE_POSITION, width)
        remainder, (cosine, sine) = width % 6, cosine_sine(rope)
        assert torch.equal(cosine[..., :remainder], torch.ones(1, 1, remainder))
        assert torch.equal(sine[..., :remainder], torch.zeros(1, 1, remainder))
        assert sine[..., remainder:].ne(0).all()


# Norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_official(dtype):
    x = (3 * randn(2, 7, 64)).to(dtype)
    assert torch.equal(rms_norm(x), OracleRMSNorm(64, eps=1e-6, elementwise_affine=False)(x).to(dtype))
    ours = build_random(lambda: RMSNorm(64, 1e-5)).to(dtype)
    expected = OracleRMSNorm(64, eps=1e-5).to(dtype)
    expected.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), expected(x))


def test_pixel_norm_equals_official():
    x = randn(2, 24, 3, 4, 5)
    assert relative_error(pixel_norm_modulate_silu(x), silu(PixelNorm()(x))) <= 1e-6
    tiny = x * 1e-5  # where the epsilon matters
    assert relative_error(pixel_norm_modulate_silu(tiny), silu(PixelNorm()(tiny))) <= 1e-6


@torch.no_grad()
def test_channel_layer_norm_equals_official():
    ours, official = build_random(lambda: ChannelLayerNorm(24, eps=1e-6)), OfficialLayerNorm(24, eps=1e-6)
    official.norm.load_state_dict(ours.state_dict())
    x = randn(2, 24, 3, 4, 5)
    assert torch.equal(ours(x), official(x))


# Attention and modulation

NAMES = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0", "q_norm": "q_norm", "k_norm": "k_norm"}


def official_attention(ours: Attention, context_width: int | None, rope: bool) -> OfficialAttention:
    width = ours.q.in_features
    with torch.device("meta"):
        model = OfficialAttention(
            query_dim=width,
            cross_attention_dim=context_width,
            heads=ours.num_heads,
            dim_head=width // ours.num_heads,
            bias=True,
            qk_norm="rms_norm",
            use_rope=rope,
        )
    weights = {}
    for name, weight in ours.state_dict().items():
        module, _, leaf = name.partition(".")
        weights[f"{NAMES[module]}.{leaf}"] = weight
    model.load_state_dict(weights, assign=True)
    return model


@torch.no_grad()
def test_self_attention_equals_official():
    ours = build_random(lambda: Attention(48, 4))
    x, rope = randn(2, 7, 48), rope_of(ONE_POSITION * torch.arange(7.0), 48)
    expected = official_attention(ours, None, True)(x, freqs_cis=cosine_sine(rope))
    assert relative_error(ours(x, rope=rope), expected) <= 1e-6


@torch.no_grad()
def test_cross_attention_to_another_width_equals_official():
    ours = build_random(lambda: Attention(48, 4, context_width=20))
    x, text, bias = randn(2, 7, 48), randn(2, 5, 20, seed=2), torch.zeros(2, 1, 1, 5)
    bias[1, ..., 3:] = -10000.0
    rope = cosine_sine(rope_of(ONE_POSITION * torch.arange(7.0), 48))  # the official cross-attention ignores it
    expected = official_attention(ours, 20, True)(x, rope, encoder_hidden_states=text, attention_mask=bias[:, 0])
    assert relative_error(ours(x, ours.project_kv(text), bias=bias), expected) <= 1e-6


def test_adaln_rows_are_shift_scale_gate_of_attention_then_mlp():
    row_numbers = torch.arange(6.0)[:, None].expand(6, 3)
    attn_mod, mlp_mod = compute_adaln_params(row_numbers, torch.zeros(1, 1, 6, 3))
    assert [row.unique().tolist() for row in (*attn_mod, *mlp_mod)] == [[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]]
    assert torch.equal(mlp_mod(torch.ones(1, 2, 3)), torch.full((1, 2, 3), 1.0 * (1 + 4) + 3))


def test_every_linear_of_the_transformer_can_be_quantized():
    with torch.device("meta"):
        model = Transformer(TransformerConfig(num_layers=1, num_heads=2, head_dim=12))
    torch_linears = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert torch_linears == []
    assert any(isinstance(module, Linear) for module in model.modules())
