"""The VAE encoder: pixels to latents."""

from __future__ import annotations

from torch import Tensor, nn

from kadr.kernels import fused
from kadr.models.vae.blocks import ResnetBlock3D, ResnetStage, SpaceToDepthDownsample, patchify
from kadr.models.vae.config import BlockConfig, VAEConfig
from kadr.nn.conv import CausalConv3d
from kadr.nn.temporal_cache import TemporalCache


def _build_block(block: BlockConfig, channels: int) -> tuple[nn.Module, int]:
    """Builds the module for one entry of the block list; returns it and its output channels."""
    if block.kind == "res_x":
        return ResnetStage(channels, block.num_layers, causal=True), channels
    out_channels = channels * block.multiplier
    if block.kind == "res_x_y":
        return ResnetBlock3D(channels, out_channels, causal=True), out_channels
    if block.kind.endswith("_res"):
        return SpaceToDepthDownsample(channels, out_channels, block.strides), out_channels
    return CausalConv3d(channels, channels, causal=True, stride=block.strides), channels


class Encoder(nn.Module):
    """The causal encoder: no latent frame depends on later pixels, so an image is encoded like the first frame."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        channels = config.encoder_base_channels
        self.conv_in = CausalConv3d(3 * config.patch_size**2, channels, causal=True)
        self.blocks = nn.ModuleList()
        for entry in config.encoder_blocks:
            module, channels = _build_block(entry, channels)
            self.blocks.append(module)
        self.conv_out = CausalConv3d(channels, config.latent_channels + 1, causal=True)

    def forward(self, pixels: Tensor, cache: TemporalCache) -> Tensor:
        """Encodes pixels (B, 3, F, H, W) in [-1, 1] to (B, C + 1, f, h, w): C means, then one log variance for all."""
        x = self.conv_in(patchify(pixels, self.patch_size), cache)
        for block in self.blocks:
            x = block(x, cache)
        return self.conv_out(fused.pixel_norm_modulate_silu(x), cache)
