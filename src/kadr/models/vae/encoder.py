"""Pixels to latents."""

from __future__ import annotations

from torch import Tensor, nn

from kadr.kernels import fused
from kadr.models.vae.blocks import ResidualLayer, ResidualStage, SpaceToDepthDown, patchify
from kadr.models.vae.config import Block, VAEConfig
from kadr.nn.conv import VideoConv
from kadr.nn.temporal_cache import Stream


def _block(block: Block, width: int) -> tuple[nn.Module, int]:
    """The module for one entry of the list, and the width it hands on."""
    if block.kind == "res_x":
        return ResidualStage(width, block.layers, causal=True), width
    wider = width * block.multiplier
    if block.kind == "res_x_y":
        return ResidualLayer(width, wider, causal=True), wider
    if block.kind.endswith("_res"):
        return SpaceToDepthDown(width, wider, block.strides), wider
    return VideoConv(width, width, causal=True, stride=block.strides), width


class Encoder(nn.Module):
    """The causal encoder: a latent frame sees no later pixels, so one picture is encoded as the first frame is."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.patch = config.patch
        width = config.encoder_width
        self.conv_in = VideoConv(3 * config.patch**2, width, causal=True)
        self.blocks = nn.ModuleList()
        for entry in config.encoder_blocks:
            module, width = _block(entry, width)
            self.blocks.append(module)
        self.conv_out = VideoConv(width, config.latent_channels + 1, causal=True)

    def forward(self, pixels: Tensor, stream: Stream) -> Tensor:
        """pixels (B, 3, F, H, W) in [-1, 1] -> (B, C + 1, f, h, w): the mean, then one log variance for them all."""
        x = self.conv_in(patchify(pixels, self.patch), stream)
        for block in self.blocks:
            x = block(x, stream)
        return self.conv_out(fused.pixel_norm_modulate_silu(x), stream)
