"""The loop over transformer blocks, with STG's perturbed branch and the step cache (see `sampling.step_cache`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kadr.cancellation import check_cancelled, current_token
from kadr.kernels.cuda.run_ahead import limit_run_ahead
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
    """Runs the first block, then either the others or the cache's prediction of their residual.

    The perturbed branch is skipped on the same steps as the plain one, with a residual of its own. Guidance takes the
    difference of the two: with one of them new and the other cached, it would amplify the change between steps.

    Args:
        x: (B, N, D), input of the first block.
        perturbation: also returns the output of some samples with some blocks perturbed.

    Returns:
        (B, N, D), and (rows, N, D) if `perturbation` is not None.
    """
    _check_before_block(x)
    first_output = blocks[0](x, block_inputs)
    first_outputs = [first_output]
    if perturbation is not None:
        rows = perturbation.rows
        check_cancelled()
        first_outputs.append(
            blocks[0](x[rows], block_inputs.for_samples(rows), perturbation.mode)
            if 0 in perturbation.blocks
            else first_output[rows]
        )
    residuals = residual_cache.predict(x, first_output)
    if residuals is not None:
        return tuple(output + residual for output, residual in zip(first_outputs, residuals, strict=True))
    outputs = run_blocks(blocks, list(first_outputs), block_inputs, perturbation, first_block=1)
    residual_cache.store(first_outputs, outputs)
    return outputs


def run_blocks(
    blocks: nn.ModuleList,
    hidden_states: list[Tensor],
    block_inputs: BlockInputs,
    perturbation: Perturbation | None,
    *,
    first_block: int = 0,
) -> tuple[Tensor, ...]:
    """Runs the blocks from `first_block` on, and the perturbed branch if `perturbation` is not None.

    Args:
        hidden_states: (B, N, D), input of `first_block`; and (rows, N, D), that of the perturbed branch, used only if
            a block before `first_block` was perturbed. Both are popped off the list: any other reference to them
            keeps them in memory.
    """
    x = hidden_states.pop(0)
    if perturbation is None:
        for block in blocks[first_block:]:
            _check_before_block(x)
            x = block(x, block_inputs)
        return (x,)
    perturbed = hidden_states.pop() if hidden_states else None
    perturbed_inputs = block_inputs.for_samples(perturbation.rows)
    branch_block = min(perturbation.blocks)
    for index, block in enumerate(blocks[first_block:], first_block):
        if index == branch_block:
            perturbed = x[perturbation.rows]  # both branches are equal up to here
        _check_before_block(x)
        x = block(x, block_inputs)
        if index >= branch_block:
            check_cancelled()
            perturbed = block(perturbed, perturbed_inputs, perturbation.mode if index in perturbation.blocks else None)
    assert perturbed is not None
    return x, perturbed


def _check_before_block(x: Tensor) -> None:
    """Stops cancelled work before the block that takes x (B, N, D), and in training after its backward pass.

    Raises:
        Cancelled: the work is cancelled.
    """
    check_cancelled()
    limit_run_ahead(x)
    token = current_token()
    if token is not None and x.requires_grad and torch.is_grad_enabled():
        x.register_hook(lambda _: token.check())  # autograd may run it in a thread of its own, without the context
