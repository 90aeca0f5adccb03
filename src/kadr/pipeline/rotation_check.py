"""A look at what a transformer does, before anything is made with it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.fp8_scales import find_weight_scales
from kadr.checkpoints.header import FP8_DTYPES
from kadr.errors import CheckpointError, KadrWarning
from kadr.quant.rotation import FULL_ROW, MIN_NOISE_CORRELATION, detect_and_undo_rotation
from kadr.sampling.positions import token_positions
from kadr.shapes import LatentGrid

PROBE_GRID = LatentGrid(2, 4, 4)  # enough tokens to tell an answer by, few enough to cost little
PROBE_FPS = 24.0


def may_be_rotated(checkpoint: Checkpoint) -> bool:
    """Whether the weights are in 8-bit floats without scales, which is how turned ones look too."""
    infos = checkpoint.sources["transformer"].infos
    return any(info.dtype in FP8_DTYPES for info in infos.values()) and not find_weight_scales(infos, infos)


@torch.no_grad()
def detect_rotation(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> int | None:
    """How the weights of a transformer were turned before they were stored; see `quant.rotation`.

    One evaluation on a few tokens of noise, more of them where the first answer is no answer.

    Returns:
        As `detect_and_undo_rotation`.

    Raises:
        CheckpointError: it answers as no trained model does.
    """
    module = checkpoint.load_transformer(dtype, keep_storage_dtype=True).to(device)
    config = module.config
    noise = torch.randn(1, PROBE_GRID.num_tokens, config.in_channels, generator=torch.Generator().manual_seed(0))
    rope = module.compute_rope(
        token_positions(PROBE_GRID, fps=PROBE_FPS, causal=config.causal_temporal_positioning)[None].to(device)
    )
    text = torch.zeros(1, 1, config.caption_channels, dtype=dtype, device=device)
    level = torch.ones(1, 1, device=device)

    def velocity(tokens: Tensor) -> Tensor:
        return module(tokens.to(device, dtype), rope, text, None, level).cpu()

    try:
        size = detect_and_undo_rotation(module, velocity, noise)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.path} does not answer noise as a trained model does (likeness {error}; at least {MIN_NOISE_CORRELATION} "
            "is expected), with its weights taken as they are or as turned by a rotation: its pictures would be "
            "noise. Download it again, or take the bf16 file of the model."
        ) from error
    if size is not None:
        told = "whole rows" if size == FULL_ROW else f"{size} columns"
        warnings.warn(
            f"{checkpoint.path} holds weights that were turned by a Walsh-Hadamard rotation of {told}, as the first "
            "fp8 upload of 0.9.7 did; they are turned back.",
            KadrWarning,
            stacklevel=2,
        )
    return size
