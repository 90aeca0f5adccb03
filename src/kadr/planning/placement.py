"""Placements: where a stage's module lives while it runs, how its weights are stored, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass

AS_STORED, CONVERTED = "as stored", "converted"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One possible placement of a stage's module, with its cost.

    Args:
        dtype: dtype of the computation: "bfloat16" or "float32".
        weight_format: "as stored" (converted layer by layer, as weights are used), "converted" (to `dtype` when the
            module is loaded), or one of `quant.weight_formats`.
        streamed_blocks: blocks that are in memory only while they run; 0 keeps the whole module resident.
        pins_blocks: streamed blocks wait in pinned memory of the host.
        chunk_frames: latent frames per chunk of the VAE decoder; 0 for other stages.
        winograd_frames: frames that a prepacked Winograd convolution computes at a time; 0 without them.
        mapped_bytes: device bytes of weights in mapped pages of files, which can be released at any time.
        private_bytes: device bytes of all other weights.
        workspace_bytes: device bytes besides weights: activations and buffers.
        host_bytes: host bytes of weights, and of images while they are prepared, where the device has its own memory.
        spare_host_bytes: host bytes that must be free besides.
        seconds: estimated time of the stage, with its module loaded.
        load_seconds: estimated time of loading the module: reading, converting, quantizing and prepacking its weights.
        window_count: number of windows of a long video that the stage samples in turn; 0 for a video in one piece.
        backend: name of the kernels that compute matrix products or convolutions.
        reason: why the planner lists this placement, shown to the user; "" for the default one.
    """

    dtype: str
    weight_format: str = CONVERTED
    streamed_blocks: int = 0
    pins_blocks: bool = False
    chunk_frames: int = 0
    winograd_frames: int = 0
    mapped_bytes: int = 0
    private_bytes: int = 0
    workspace_bytes: int = 0
    host_bytes: int = 0
    spare_host_bytes: int = 0
    seconds: float = 0.0
    load_seconds: float = 0.0
    window_count: int = 0
    backend: str = "torch"
    reason: str = ""

    @property
    def device_bytes(self) -> int:
        """Bytes on the device at the stage's peak."""
        return self.mapped_bytes + self.private_bytes + self.workspace_bytes


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """A stage and the placements to choose from.

    Args:
        stage: "text", "encode", "denoise", "upscale", "refine" or "decode".
        component: name of its module in the `ModuleCache`.
        placements: possible placements, the best first.
    """

    stage: str
    component: str
    placements: tuple[Placement, ...]


def describe_weights(placement: Placement) -> str:
    """Describes how a stage's weights are stored and computed with, for people."""
    if placement.weight_format == CONVERTED:
        words = placement.dtype
    else:
        words = f"{placement.weight_format}, computed in {placement.dtype}"
    return f"{words}, {placement.streamed_blocks} blocks streamed" if placement.streamed_blocks else words
