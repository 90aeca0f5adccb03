"""A network's layers where a step cache may stand in for those after the first; see `sampling.step_cache`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from kadr.sampling.guidance import Disturb
from kadr.sampling.step_cache import Stream

if TYPE_CHECKING:
    from kadr.models.transformer import Given


def through(
    layers: nn.ModuleList, x: Tensor, given: Given, cache: Stream, disturb: Disturb | None = None
) -> tuple[Tensor, ...]:
    """What comes out of the last layer, or what the cache makes of earlier steps.

    A disturbed evaluation is skipped on the steps on which the plain one is, and has a residual of its own: guidance
    takes the difference of both, and of one that is new and one that is old it would push along what changed between.

    Args:
        x: (B, N, D) before the first layer.
        disturb: also give back what some samples come to with some blocks disturbed.

    Returns:
        (B, N, D), and (rows, N, D) where `disturb` is given.
    """
    first = layers[0](x, given)
    starts = [first]
    if disturb is not None:
        rows = disturb.rows
        starts.append(layers[0](x[rows], given.rows(rows), disturb.mode) if 0 in disturb.blocks else first[rows])
    added = cache.recall(x, first)
    if added is not None:
        return tuple(start + part for start, part in zip(starts, added, strict=True))
    ends = onward(layers, list(starts), given, disturb, begin=1)
    cache.keep(starts, ends)
    return ends


def onward(
    layers: nn.ModuleList, starts: list[Tensor], given: Given, disturb: Disturb | None, *, begin: int = 0
) -> tuple[Tensor, ...]:
    """What comes out of the last layer, and where `disturb` is given what some samples come to disturbed.

    Args:
        starts: (B, N, D) before layer `begin`; and (rows, N, D), which counts where a block before it is disturbed.
            They are taken out of the list: who keeps them keeps them in memory.
    """
    x = starts.pop(0)
    if disturb is None:
        for layer in layers[begin:]:
            x = layer(x, given)
        return (x,)
    aside, own, apart = starts.pop() if starts else None, given.rows(disturb.rows), min(disturb.blocks)
    for index, layer in enumerate(layers[begin:], begin):
        if index == apart:
            aside = x[disturb.rows]  # up to here both are one
        x = layer(x, given)
        if index >= apart:
            aside = layer(aside, own, disturb.mode if index in disturb.blocks else None)
    assert aside is not None
    return x, aside
