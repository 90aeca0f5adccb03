"""A network's layers where a step cache may stand in for those after the first; see `sampling.cache`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from kadr.sampling.cache import Stream
from kadr.sampling.guidance import Disturb

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
    ends = _after_first(layers, starts, given, disturb)
    cache.keep(starts, ends)
    return tuple(ends)


def _after_first(
    layers: nn.ModuleList, starts: Sequence[Tensor], given: Given, disturb: Disturb | None
) -> list[Tensor]:
    x = starts[0]
    if disturb is None:
        for layer in layers[1:]:
            x = layer(x, given)
        return [x]
    apart, own, aside = min(disturb.blocks), given.rows(disturb.rows), starts[1]
    for index, layer in enumerate(layers[1:], 1):
        if index == apart:
            aside = x[disturb.rows]  # up to here both are one
        x = layer(x, given)
        if index >= apart:
            aside = layer(aside, own, disturb.mode if index in disturb.blocks else None)
    return [x, aside]
