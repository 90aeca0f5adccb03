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

ANCHOR_FRAME = -TEMPORAL_COMPRESSION  # pixel frame at which the remembered picture stands: one latent before the window


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

    def append_to(
        self, state: LatentState, resolved_pass: ResolvedPass, *, causal: bool, draw: Callable[[torch.Size], Tensor]
    ) -> LatentState:
        """The state with them behind it."""
        grid = LatentGrid(*self.latents.shape[2:])
        where = token_positions(grid, fps=resolved_pass.fps, causal=causal, first_frame=self.first_frame)
        return append_keyframe(state, self.latents, where, self.strength, draw(self.latents.shape))


class WindowStore(Protocol):
    """Where finished windows are: what each added to the video, (1, C, n, h, w), fp32, on the CPU."""

    def has(self, index: int) -> bool:
        """Whether window `index` is there, from 0."""

    def store(self, index: int, latents: Tensor) -> None:
        """Keep what window `index` added, from 0."""

    def read(self, index: int) -> Tensor:
        """What it added. The end of it is taken back by the next window, which crosses over."""


class InMemoryWindowStore:
    """Finished windows that are only needed until the run ends."""

    def __init__(self) -> None:
        self.latents: list[Tensor] = []

    def has(self, index: int) -> bool:
        return index < len(self.latents)

    def store(self, index: int, latents: Tensor) -> None:
        assert index == len(self.latents)
        self.latents.append(latents)

    def read(self, index: int) -> Tensor:
        return self.latents[index]


@dataclass(frozen=True)
class WindowedLatents:
    """The latents of a long video, one piece (1, C, n, h, w) for each window, read when its turn has come.

    Args:
        spans: of the windows.
        read_window: the latents from a window's first kept one on, at least up to where the next window's begin.
    """

    spans: tuple[Span, ...]
    read_window: Callable[[int], Tensor]

    @classmethod
    def from_latents(cls, latents: Tensor, spans: tuple[Span, ...]) -> WindowedLatents:
        """Those of a whole video, (1, C, f, h, w)."""
        return cls(spans, lambda number: latents[:, :, spans[number].output_start : spans[number].end])

    def __iter__(self) -> Iterator[Tensor]:
        ends = [*(span.output_start for span in self.spans[1:]), self.spans[-1].end]
        for number, (span, end) in enumerate(zip(self.spans, ends, strict=True)):
            yield self.read_window(number)[:, :, : end - span.output_start]

    def to_tensor(self) -> Tensor:
        """All of them, (1, C, f, h, w)."""
        return torch.cat(list(self), dim=2)


def missing_windows(store: WindowStore, spans: Sequence[Span]) -> list[int]:
    """The numbers of the windows that are to be made."""
    return [number for number in range(len(spans)) if not store.has(number)]


def sample_windows(
    windows: Windows,
    spans: tuple[Span, ...],
    store: WindowStore,
    sample_window: Callable[[int, Sequence[Guide]], Tensor],
    anchor_latents: Tensor | None,
) -> WindowedLatents:
    """Make the windows that are not there yet. Those after one that is made again were made from one just like it.

    Args:
        sample_window: makes a window, by its number, from 0, and what it is shown: latents (1, C, n, h, w).
        anchor_latents: the latent (1, C, 1, h, w) that is to be remembered.
    """
    _, overlap = windows.latent_frames
    remembered = (
        []
        if anchor_latents is None
        else [Guide("remembered", anchor_latents, ANCHOR_FRAME, float(windows.anchor_strength or 0))]
    )
    for number in missing_windows(store, spans):
        if number == 0:
            store.store(0, sample_window(0, remembered).cpu())
            continue
        before = store.read(number - 1)
        end = Guide("overlap", before[:, :, -overlap:], 0, windows.overlap_strength)
        made = sample_window(number, [end, *remembered]).cpu()
        store.store(number, blend_window(made, before, store.read(0), overlap=overlap, adain_factor=windows.adain))
    return WindowedLatents(spans, store.read)


def rechunk(latents: Iterable[Tensor], chunk_frames: int) -> Iterator[Tensor]:
    """Latents (1, C, n, h, w) that come in any pieces, `chunk_frames` frames at a time; the last ones perhaps fewer."""
    waiting: Tensor | None = None
    for part in latents:
        waiting = part if waiting is None else torch.cat([waiting, part], dim=2)
        whole = waiting.shape[2] // chunk_frames * chunk_frames
        yield from waiting[:, :, :whole].split(chunk_frames, dim=2) if whole else ()
        waiting = waiting[:, :, whole:]
    if waiting is not None and waiting.shape[2]:
        yield waiting


def conditions_in_window(conditions: Iterable[PreparedCondition], span: Span) -> list[PreparedCondition]:
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
        for item in conditions
        if _lies_in(item.resolved_condition, span)
    ]


def is_anchor_image(condition: PreparedCondition) -> bool:
    """Whether a condition is a whole picture at frame 0, which a long video can remember."""
    return (
        condition.resolved_condition.start_frame == 0
        and len(condition.resolved_condition.frames) == 1
        and condition.resolved_condition.condition.box is None
    )


def check_inside_windows(conditions: Iterable[ResolvedCondition], spans: Sequence[Span]) -> None:
    """Refuse clips that lie over the end of a window.

    Raises:
        RequestError: with the windows.
    """
    for item in conditions:
        if not any(_lies_in(item, span) for span in spans):
            ranges = ", ".join(
                f"{span.first_frame + bool(span.start)} to {span.first_frame + span.frames - 1}" for span in spans[:4]
            )
            raise RequestError(
                f"{item} does not lie inside one window; they make the frames {ranges}"
                f"{' and so on' if len(spans) > 4 else ''}. Move it, take a part of it, or give a longer --window."
            )


def _lies_in(condition: ResolvedCondition, span: Span) -> bool:
    start = condition.start_frame - span.first_frame
    first = 1 if span.start else 0
    return first <= start and start + len(condition.frames) <= span.frames
