"""A long video, window by window. Nothing is carried from one to the next but latents that are kept.

So a run that was cut off goes on from what it kept, and comes to the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kadr.errors import RequestError
from kadr.pipeline.stages.prepared_conditions import PreparedCondition
from kadr.request.passes import ResolvedPass
from kadr.request.resolved_conditions import ResolvedCondition
from kadr.request.windows import Span, Windows
from kadr.sampling.blending import blend_window
from kadr.sampling.conditioning import append_keyframe
from kadr.sampling.positions import token_positions
from kadr.sampling.state import LatentState
from kadr.shapes import TEMPORAL_COMPRESSION, LatentGrid

BEFORE = -TEMPORAL_COMPRESSION  # pixel frame at which the remembered picture stands: one latent before the window


class Guide(NamedTuple):
    """Latents that a window is shown beside its own, as tokens that are taken away afterwards.

    Args:
        name: of its stream of noise.
        latents: (1, C, n, h, w), normalised.
        first_frame: pixel frame of the window at which they stand.
        strength: in (0, 1].
    """

    name: str
    latents: Tensor
    first_frame: int
    strength: float

    def shown(
        self, state: LatentState, plan: ResolvedPass, *, causal: bool, draw: Callable[[torch.Size], Tensor]
    ) -> LatentState:
        """The state with them behind it."""
        grid = LatentGrid(*self.latents.shape[2:])
        where = token_positions(grid, fps=plan.fps, causal=causal, first_frame=self.first_frame)
        return append_keyframe(state, self.latents, where, self.strength, draw(self.latents.shape))


class Kept(Protocol):
    """Where finished windows are: what each added to the video, (1, C, n, h, w), fp32, on the CPU."""

    def has(self, number: int) -> bool:
        """Whether window `number` is there, from 0."""

    def keep(self, number: int, latents: Tensor) -> None:
        """Keep what window `number` added, from 0."""

    def read(self, number: int) -> Tensor:
        """What it added. The end of it is taken back by the next window, which crosses over."""


class InMemory:
    """Finished windows that are only needed until the run ends."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []

    def has(self, number: int) -> bool:
        return number < len(self.made)

    def keep(self, number: int, latents: Tensor) -> None:
        assert number == len(self.made)
        self.made.append(latents)

    def read(self, number: int) -> Tensor:
        return self.made[number]


@dataclass(frozen=True)
class Pieces:
    """The latents of a long video, one piece (1, C, n, h, w) for each window, read when its turn has come.

    Args:
        spans: of the windows.
        read: the latents from a window's first kept one on, at least up to where the next window's begin.
    """

    spans: tuple[Span, ...]
    read: Callable[[int], Tensor]

    @classmethod
    def of(cls, latents: Tensor, spans: tuple[Span, ...]) -> Pieces:
        """Those of a whole video, (1, C, f, h, w)."""
        return cls(spans, lambda number: latents[:, :, spans[number].output_start : spans[number].end])

    def __iter__(self) -> Iterator[Tensor]:
        ends = [*(span.output_start for span in self.spans[1:]), self.spans[-1].end]
        for number, (span, end) in enumerate(zip(self.spans, ends, strict=True)):
            yield self.read(number)[:, :, : end - span.output_start]

    def whole(self) -> Tensor:
        """All of them, (1, C, f, h, w)."""
        return torch.cat(list(self), dim=2)


def missing(kept: Kept, spans: Sequence[Span]) -> list[int]:
    """The numbers of the windows that are to be made."""
    return [number for number in range(len(spans)) if not kept.has(number)]


def sample_windows(
    windows: Windows,
    spans: tuple[Span, ...],
    kept: Kept,
    sample: Callable[[int, Sequence[Guide]], Tensor],
    picture: Tensor | None,
) -> Pieces:
    """Make the windows that are not there yet. Those after one that is made again were made from one just like it.

    Args:
        sample: makes a window, by its number, from 0, and what it is shown: latents (1, C, n, h, w).
        picture: the latent (1, C, 1, h, w) that is to be remembered.
    """
    _, overlap = windows.latent_frames
    remembered = [] if picture is None else [Guide("remembered", picture, BEFORE, float(windows.anchor_strength or 0))]
    for number in missing(kept, spans):
        if number == 0:
            kept.keep(0, sample(0, remembered).cpu())
            continue
        before = kept.read(number - 1)
        end = Guide("overlap", before[:, :, -overlap:], 0, windows.overlap_strength)
        made = sample(number, [end, *remembered]).cpu()
        kept.keep(number, blend_window(made, before, kept.read(0), overlap=overlap, adain_factor=windows.adain))
    return Pieces(spans, kept.read)


def rechunked(parts: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """Latents (1, C, n, h, w) that come in any pieces, `count` frames at a time; the last ones perhaps fewer."""
    waiting: Tensor | None = None
    for part in parts:
        waiting = part if waiting is None else torch.cat([waiting, part], dim=2)
        whole = waiting.shape[2] // count * count
        yield from waiting[:, :, :whole].split(count, dim=2) if whole else ()
        waiting = waiting[:, :, whole:]
    if waiting is not None and waiting.shape[2]:
        yield waiting


def in_window(items: Iterable[PreparedCondition], span: Span) -> list[PreparedCondition]:
    """The conditions that lie wholly inside a window, where they stand in it.

    Of a later window the first latent is dropped; what would stand at its frame 0 is the end of the one before.
    """
    return [
        replace(
            item,
            resolved_condition=replace(
                item.resolved_condition, start_frame=item.resolved_condition.start_frame - span.first_frame
            ),
        )
        for item in items
        if _lies_in(item.resolved_condition, span)
    ]


def is_first_picture(item: PreparedCondition) -> bool:
    """Whether a condition is a whole picture at frame 0, which a long video can remember."""
    return (
        item.resolved_condition.start_frame == 0
        and len(item.resolved_condition.frames) == 1
        and item.resolved_condition.condition.box is None
    )


def check_placed(placed: Iterable[ResolvedCondition], spans: Sequence[Span]) -> None:
    """Refuse clips that lie over the end of a window.

    Raises:
        RequestError: with the windows.
    """
    for item in placed:
        if not any(_lies_in(item, span) for span in spans):
            ranges = ", ".join(
                f"{span.first_frame + bool(span.start)} to {span.first_frame + span.frames - 1}" for span in spans[:4]
            )
            raise RequestError(
                f"{item} does not lie inside one window; they make the frames {ranges}"
                f"{' and so on' if len(spans) > 4 else ''}. Move it, take a part of it, or give a longer --window."
            )


def _lies_in(placed: ResolvedCondition, span: Span) -> bool:
    start = placed.start_frame - span.first_frame
    first = 1 if span.start else 0
    return first <= start and start + len(placed.frames) <= span.frames
