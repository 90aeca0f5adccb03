"""A network's layers where a step cache may stand in for those after the first; see `sampling.step_cache`."""

from __future__ import annotations

from torch import Tensor, nn

from kadr.models.block_inputs import BlockInputs
from kadr.sampling.guidance import Perturbation
from kadr.sampling.step_cache import ResidualCache


def run_blocks_cached(
    blocks: nn.ModuleList,
    x: Tensor,
    block_inputs: BlockInputs,
    residual_cache: ResidualCache,
    perturbation: Perturbation | None = None,
) -> tuple[Tensor, ...]:
    """What comes out of the last layer, or what the cache makes of earlier steps.

    A disturbed evaluation is skipped on the steps on which the plain one is, and has a residual of its own: guidance
    takes the difference of both, and of one that is new and one that is old it would push along what changed between.

    Args:
        x: (B, N, D) before the first layer.
        perturbation: also give back what some samples come to with some blocks disturbed.

    Returns:
        (B, N, D), and (rows, N, D) where `perturbation` is given.
    """
    first = blocks[0](x, block_inputs)
    starts = [first]
    if perturbation is not None:
        rows = perturbation.rows
        starts.append(
            blocks[0](x[rows], block_inputs.for_samples(rows), perturbation.mode)
            if 0 in perturbation.blocks
            else first[rows]
        )
    added = residual_cache.predict(x, first)
    if added is not None:
        return tuple(start + part for start, part in zip(starts, added, strict=True))
    ends = run_blocks(blocks, list(starts), block_inputs, perturbation, first_block=1)
    residual_cache.store(starts, ends)
    return ends


def run_blocks(
    blocks: nn.ModuleList,
    hidden_states: list[Tensor],
    block_inputs: BlockInputs,
    perturbation: Perturbation | None,
    *,
    first_block: int = 0,
) -> tuple[Tensor, ...]:
    """What comes out of the last layer, and where `perturbation` is given what some samples come to disturbed.

    Args:
        hidden_states: (B, N, D) before layer `first_block`; and (rows, N, D), which counts where a block before it is disturbed.
            They are taken out of the list: who keeps them keeps them in memory.
    """
    x = hidden_states.pop(0)
    if perturbation is None:
        for layer in blocks[first_block:]:
            x = layer(x, block_inputs)
        return (x,)
    aside, own, apart = (
        hidden_states.pop() if hidden_states else None,
        block_inputs.for_samples(perturbation.rows),
        min(perturbation.blocks),
    )
    for index, layer in enumerate(blocks[first_block:], first_block):
        if index == apart:
            aside = x[perturbation.rows]  # up to here both are one
        x = layer(x, block_inputs)
        if index >= apart:
            aside = layer(aside, own, perturbation.mode if index in perturbation.blocks else None)
    assert aside is not None
    return x, aside
