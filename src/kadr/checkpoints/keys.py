"""Key tables: every state-dict key of kadr's modules, in the official single file, in a diffusers folder, in GGUF.

{n} is a VAE block, {i} a transformer block or a layer, {side} is encoder or decoder, * is weight or bias. {block} is
the block's key in the file, which differs between the two layouts and comes from the lists below. A component's table
is total: a key it does not have does not load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Key(NamedTuple):
    """One row of a key table: the same tensor in three layouts."""

    kadr: str
    single_file: str
    diffusers: str


def _same_in_both(kadr: str, official: str) -> Key:
    return Key(kadr, official, official)


TRANSFORMER_PREFIX, VAE_PREFIX = "model.diffusion_model.", "vae."  # of the keys in a single file of both
BARE_TRANSFORMER_PREFIX = "diffusion_model."  # in ComfyUI's exports of a transformer
TEXT_ENCODER_PREFIX = "text_encoders.t5xxl."  # in files that hold the text encoder too
_KADR_BLOCK, _OFFICIAL_BLOCK = "blocks.{i}", "transformer_blocks.{i}"
TRANSFORMER_KEYS = (
    Key("proj_in.*", "patchify_proj.*", "proj_in.*"),
    Key(
        "time_embed.linear_1.*",
        "adaln_single.emb.timestep_embedder.linear_1.*",
        "time_embed.emb.timestep_embedder.linear_1.*",
    ),
    Key(
        "time_embed.linear_2.*",
        "adaln_single.emb.timestep_embedder.linear_2.*",
        "time_embed.emb.timestep_embedder.linear_2.*",
    ),
    Key("adaln_linear.*", "adaln_single.linear.*", "time_embed.linear.*"),
    _same_in_both("caption_proj.up.*", "caption_projection.linear_1.*"),
    _same_in_both("caption_proj.down.*", "caption_projection.linear_2.*"),
    _same_in_both("scale_shift_table", "scale_shift_table"),
    _same_in_both("proj_out.*", "proj_out.*"),
    _same_in_both(f"{_KADR_BLOCK}.scale_shift_table", f"{_OFFICIAL_BLOCK}.scale_shift_table"),
    *(
        key
        for kadr, official in (("self_attention", "attn1"), ("cross_attention", "attn2"))
        for key in (
            _same_in_both(f"{_KADR_BLOCK}.{kadr}.q.*", f"{_OFFICIAL_BLOCK}.{official}.to_q.*"),
            _same_in_both(f"{_KADR_BLOCK}.{kadr}.k.*", f"{_OFFICIAL_BLOCK}.{official}.to_k.*"),
            _same_in_both(f"{_KADR_BLOCK}.{kadr}.v.*", f"{_OFFICIAL_BLOCK}.{official}.to_v.*"),
            _same_in_both(f"{_KADR_BLOCK}.{kadr}.out.*", f"{_OFFICIAL_BLOCK}.{official}.to_out.0.*"),
            Key(
                f"{_KADR_BLOCK}.{kadr}.q_norm.*",
                f"{_OFFICIAL_BLOCK}.{official}.q_norm.*",
                f"{_OFFICIAL_BLOCK}.{official}.norm_q.*",
            ),
            Key(
                f"{_KADR_BLOCK}.{kadr}.k_norm.*",
                f"{_OFFICIAL_BLOCK}.{official}.k_norm.*",
                f"{_OFFICIAL_BLOCK}.{official}.norm_k.*",
            ),
        )
    ),
    _same_in_both(f"{_KADR_BLOCK}.feed_forward.up.*", f"{_OFFICIAL_BLOCK}.ff.net.0.proj.*"),
    _same_in_both(f"{_KADR_BLOCK}.feed_forward.down.*", f"{_OFFICIAL_BLOCK}.ff.net.2.*"),
)

_TIMESTEP_LINEAR = "timestep_embedder.linear_"
VAE_KEYS = (
    Key("statistics.mean", "per_channel_statistics.mean-of-means", "latents_mean"),
    Key("statistics.std", "per_channel_statistics.std-of-means", "latents_std"),
    _same_in_both("{side}.conv_in.*", "{side}.conv_in.conv.*"),
    _same_in_both("{side}.conv_out.*", "{side}.conv_out.conv.*"),
    Key("decoder.timestep_scale_multiplier", "decoder.timestep_scale_multiplier", "decoder.timestep_scale_multiplier"),
    Key(
        "decoder.time_embed.linear_1.*",
        f"decoder.last_time_embedder.{_TIMESTEP_LINEAR}1.*",
        f"decoder.time_embedder.{_TIMESTEP_LINEAR}1.*",
    ),
    Key(
        "decoder.time_embed.linear_2.*",
        f"decoder.last_time_embedder.{_TIMESTEP_LINEAR}2.*",
        f"decoder.time_embedder.{_TIMESTEP_LINEAR}2.*",
    ),
    Key("decoder.scale_shift_table", "decoder.last_scale_shift_table", "decoder.scale_shift_table"),
    _same_in_both("{side}.blocks.{n}.time_embed.linear_1.*", f"{{side}}.{{block}}.time_embedder.{_TIMESTEP_LINEAR}1.*"),
    _same_in_both("{side}.blocks.{n}.time_embed.linear_2.*", f"{{side}}.{{block}}.time_embedder.{_TIMESTEP_LINEAR}2.*"),
    *(
        key
        for kadr, single, diffusers in (
            ("{side}.blocks.{n}.res_blocks.{i}", "{side}.{block}.res_blocks.{i}", "{side}.{block}.resnets.{i}"),
            ("{side}.blocks.{n}", "{side}.{block}", "{side}.{block}"),
        )
        for key in (
            Key(f"{kadr}.conv1.*", f"{single}.conv1.conv.*", f"{diffusers}.conv1.conv.*"),
            Key(f"{kadr}.conv2.*", f"{single}.conv2.conv.*", f"{diffusers}.conv2.conv.*"),
            Key(f"{kadr}.shortcut_norm.*", f"{single}.norm3.norm.*", f"{diffusers}.norm3.*"),
            Key(f"{kadr}.shortcut.*", f"{single}.conv_shortcut.*", f"{diffusers}.conv_shortcut.conv.*"),
            Key(f"{kadr}.scale_shift_table", f"{single}.scale_shift_table", f"{diffusers}.scale_shift_table"),
            Key(f"{kadr}.per_channel_scale1", f"{single}.per_channel_scale1", f"{diffusers}.per_channel_scale1"),
            Key(f"{kadr}.per_channel_scale2", f"{single}.per_channel_scale2", f"{diffusers}.per_channel_scale2"),
        )
    ),
    _same_in_both("{side}.blocks.{n}.conv.*", "{side}.{block}.conv.conv.*"),  # space_to_depth and depth_to_space blocks
    _same_in_both("{side}.blocks.{n}.*", "{side}.{block}.conv.*"),  # strided convolutions (0.9, 0.9.1)
)
# Latent statistics that the official file has besides the two in use; nothing reads them.
VAE_UNUSED_KEYS = (
    "per_channel_statistics.mean-of-stds",
    "per_channel_statistics.mean-of-stds_over_std-of-means",
    "per_channel_statistics.channel",
)

_ENCODER_0_9 = (
    "down_blocks.0", "down_blocks.0.downsamplers.0", "down_blocks.0.conv_out",
    "down_blocks.1", "down_blocks.1.downsamplers.0", "down_blocks.1.conv_out",
    "down_blocks.2", "down_blocks.2.downsamplers.0", "down_blocks.3", "mid_block",
)  # fmt: skip
_DECODER_0_9_1 = (
    "mid_block", "up_blocks.0.upsamplers.0", "up_blocks.0", "up_blocks.1.upsamplers.0",
    "up_blocks.1", "up_blocks.2.upsamplers.0", "up_blocks.2",
)  # fmt: skip
# Key of block {n} of encoder and decoder in a diffusers folder, by VAE family.
DIFFUSERS_VAE_BLOCKS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "0.9": {
        "encoder": _ENCODER_0_9,
        "decoder": (
            "mid_block", "up_blocks.0", "up_blocks.1.upsamplers.0", "up_blocks.1", "up_blocks.2.conv_in",
            "up_blocks.2.upsamplers.0", "up_blocks.2", "up_blocks.3.conv_in", "up_blocks.3.upsamplers.0", "up_blocks.3",
        ),
    },
    "0.9.1": {"encoder": _ENCODER_0_9, "decoder": _DECODER_0_9_1},
    "0.9.5": {
        "encoder": (
            "down_blocks.0", "down_blocks.0.downsamplers.0", "down_blocks.1", "down_blocks.1.downsamplers.0",
            "down_blocks.2", "down_blocks.2.downsamplers.0", "down_blocks.3", "down_blocks.3.downsamplers.0",
            "mid_block",
        ),
        "decoder": _DECODER_0_9_1,
    },
}  # fmt: skip
_SINGLE_FILE_VAE_BLOCKS = {"encoder": "down_blocks.{n}", "decoder": "up_blocks.{n}"}

_T5_BLOCK = "encoder.block.{i}.layer"
T5_KEYS = (
    _same_in_both("embedding.*", "shared.*"),
    _same_in_both("position_bias.*", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.*"),
    _same_in_both("final_norm.*", "encoder.final_layer_norm.*"),
    _same_in_both("blocks.{i}.attention_norm.*", f"{_T5_BLOCK}.0.layer_norm.*"),
    *(_same_in_both(f"blocks.{{i}}.attention.{x}.*", f"{_T5_BLOCK}.0.SelfAttention.{x}.*") for x in "qkvo"),
    _same_in_both("blocks.{i}.feed_forward_norm.*", f"{_T5_BLOCK}.1.layer_norm.*"),
    _same_in_both("blocks.{i}.feed_forward.gate.*", f"{_T5_BLOCK}.1.DenseReluDense.wi_0.*"),
    _same_in_both("blocks.{i}.feed_forward.up.*", f"{_T5_BLOCK}.1.DenseReluDense.wi_1.*"),
    _same_in_both("blocks.{i}.feed_forward.down.*", f"{_T5_BLOCK}.1.DenseReluDense.wo.*"),
)
# The tied copy of the embedding that some files hold a second time.
T5_UNUSED_KEYS = ("encoder.embed_tokens.weight",)

_T5_GGUF_BLOCK = "enc.blk.{i}"
# llama.cpp's names.
T5_GGUF_KEYS = (
    _same_in_both("embedding.*", "token_embd.*"),
    _same_in_both("position_bias.*", "enc.blk.0.attn_rel_b.*"),
    _same_in_both("final_norm.*", "enc.output_norm.*"),
    _same_in_both("blocks.{i}.attention_norm.*", f"{_T5_GGUF_BLOCK}.attn_norm.*"),
    *(_same_in_both(f"blocks.{{i}}.attention.{x}.*", f"{_T5_GGUF_BLOCK}.attn_{x}.*") for x in "qkvo"),
    _same_in_both("blocks.{i}.feed_forward_norm.*", f"{_T5_GGUF_BLOCK}.ffn_norm.*"),
    *(_same_in_both(f"blocks.{{i}}.feed_forward.{x}.*", f"{_T5_GGUF_BLOCK}.ffn_{x}.*") for x in ("gate", "up", "down")),
)

# The single file and the diffusers folder of an upscaler have the same keys.
UPSCALER_KEYS = (
    _same_in_both("conv_in.*", "initial_conv.*"),
    _same_in_both("norm_in.*", "initial_norm.*"),
    _same_in_both("upsample_conv.*", "upsampler.0.*"),
    _same_in_both("conv_out.*", "final_conv.*"),
    *(
        _same_in_both(f"{blocks}.{{i}}.{leaf}.*", f"{blocks}.{{i}}.{leaf}.*")
        for blocks in ("res_blocks", "post_upsample_res_blocks")
        for leaf in ("conv1", "norm1", "conv2", "norm2")
    ),
)

_PLACEHOLDERS = {
    "{n}": r"(?P<n>\d+)",
    "{i}": r"(?P<i>\d+)",
    "{side}": r"(?P<side>encoder|decoder)",
    "*": r"(?P<leaf>weight|bias)",
}


def _pattern(kadr_key: str) -> re.Pattern[str]:
    parts = re.split(r"(\{n\}|\{i\}|\{side\}|\*)", kadr_key)
    return re.compile("".join(_PLACEHOLDERS.get(part, re.escape(part)) for part in parts))


def map_keys(
    table: Iterable[Key],
    kadr_keys: Iterable[str],
    *,
    diffusers_vae_family: str | None = None,
    is_diffusers: bool = False,
) -> dict[str, str]:
    """Maps every kadr key to its file key.

    Args:
        is_diffusers: map to the keys of a diffusers folder instead of the official single file's.
        diffusers_vae_family: family in `DIFFUSERS_VAE_BLOCKS`; required for a VAE with `is_diffusers`.

    Raises:
        KeyError: the table lacks a key; the table is at fault.
    """
    rules = [(_pattern(key.kadr), key.diffusers if is_diffusers else key.single_file) for key in table]
    return {key: _translate(key, rules, diffusers_vae_family) for key in kadr_keys}


def _translate(kadr_key: str, rules: list[tuple[re.Pattern[str], str]], diffusers_vae_family: str | None) -> str:
    for pattern, file_key in rules:
        if match := pattern.fullmatch(kadr_key):
            fields = match.groupdict()
            if "{block}" in file_key:
                side, n = fields["side"], int(fields["n"])
                block_key = (
                    DIFFUSERS_VAE_BLOCKS[diffusers_vae_family][side][n]
                    if diffusers_vae_family
                    else _SINGLE_FILE_VAE_BLOCKS[side].format(n=n)
                )
                file_key = file_key.replace("{block}", block_key)
            return file_key.replace("*", fields.get("leaf", "")).format(**fields)
    raise KeyError(kadr_key)
