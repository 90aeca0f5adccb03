"""Pixels to latents."""

from __future__ import annotations

from torch import Tensor, nn

from kadr.kernels import fused
from kadr.models.vae.blocks import ResnetBlock3D, ResnetStage, SpaceToDepthDownsample, patchify
from kadr.models.vae.config import BlockConfig, VAEConfig
from kadr.nn.conv import CausalConv3d
from kadr.nn.temporal_cache import TemporalCache


def _build_block(block: BlockConfig, channels: int) -> tuple[nn.Module, int]:
    """The module for one entry of the list, and the width it hands on."""
    if block.kind == "res_x":
        return ResnetStage(channels, block.num_layers, causal=True), channels
    wider = channels * block.multiplier
    if block.kind == "res_x_y":
        return ResnetBlock3D(channels, wider, causal=True), wider
    if block.kind.endswith("_res"):
        return SpaceToDepthDownsample(channels, wider, block.strides), wider
    return CausalConv3d(channels, channels, causal=True, stride=block.strides), channels


class Encoder(nn.Module):
    """The causal encoder: a latent frame sees no later pixels, so one picture is encoded as the first frame is."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        width = config.encoder_base_channels
        self.conv_in = CausalConv3d(3 * config.patch_size**2, width, causal=True)
        self.blocks = nn.ModuleList()
        for entry in config.encoder_blocks:
            module, width = _build_block(entry, width)
            self.blocks.append(module)
        self.conv_out = CausalConv3d(width, config.latent_channels + 1, causal=True)

    def forward(self, pixels: Tensor, cache: TemporalCache) -> Tensor:
        """pixels (B, 3, F, H, W) in [-1, 1] -> (B, C + 1, f, h, w): the mean, then one log variance for them all."""
        x = self.conv_in(patchify(pixels, self.patch_size), cache)
        for block in self.blocks:
            x = block(x, cache)
        return self.conv_out(fused.pixel_norm_modulate_silu(x), cache)
