"""Checks a transformer for Hadamard-rotated weights by its prediction on noise, before anything is made with it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.fp8_scales import find_weight_scales
from kadr.checkpoints.header import FP8_DTYPES
from kadr.errors import CheckpointError, KadrWarning
from kadr.memory.device import can_hold, move_module
from kadr.quant.rotation import FULL_ROW, MIN_NOISE_CORRELATION, detect_and_undo_rotation
from kadr.sampling.positions import token_positions
from kadr.shapes import LatentGrid

PROBE_GRID = LatentGrid(2, 4, 4)  # enough tokens for a reliable correlation, few enough to cost little
PROBE_FPS = 24.0


def may_be_rotated(checkpoint: Checkpoint) -> bool:
    """Returns whether weights are 8-bit floats without scales, as Hadamard-rotated ones are."""
    infos = checkpoint.sources["transformer"].infos
    return any(info.dtype in FP8_DTYPES for info in infos.values()) and not find_weight_scales(infos, infos)


@torch.no_grad()
def detect_rotation(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> int | None:
    """Detects the Hadamard rotation that a transformer's weights were stored with; see `quant.rotation`.

    Takes one model evaluation on a few tokens of noise, and more if that prediction does not match the noise.

    Returns:
        As `detect_and_undo_rotation`.

    Raises:
        CheckpointError: no rotation gives the prediction of a trained model.
    """
    if not can_hold(device, torch.float8_e4m3fn):
        device = torch.device("cpu")
    module = move_module(checkpoint.load_transformer(dtype, keep_storage_dtype=True), device)
    config = module.config
    noise = torch.randn(1, PROBE_GRID.num_tokens, config.in_channels, generator=torch.Generator().manual_seed(0))
    rope = module.compute_rope(
        token_positions(PROBE_GRID, fps=PROBE_FPS, causal=config.causal_temporal_positioning)[None].to(device)
    )
    prompt_embeds = torch.zeros(1, 1, config.caption_channels, dtype=dtype, device=device)
    sigma = torch.ones(1, 1, device=device)

    def velocity(tokens: Tensor) -> Tensor:
        return module(tokens.to(device, dtype), rope, prompt_embeds, None, sigma).cpu()

    try:
        size = detect_and_undo_rotation(module, velocity, noise)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.path}: its prediction on noise does not correlate with the noise, as a trained model's does "
            f"(correlation {error}; at least {MIN_NOISE_CORRELATION} is expected), with its weights as they are or "
            "Hadamard-rotated back: its videos would be noise. Download it again, or use the bf16 file of the model."
        ) from error
    if size is not None:
        extent = "whole rows" if size == FULL_ROW else f"{size} columns"
        warnings.warn(
            f"{checkpoint.path} has Hadamard-rotated weights, over {extent}, as the first fp8 upload of 0.9.7 did; "
            "they are rotated back.",
            KadrWarning,
            stacklevel=2,
        )
    return size
