"""Sampling of a long video, window by window: a window depends on earlier ones only through their stored latents.

So an interrupted generation continues from its stored windows, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kadr.request.passes import ResolvedPass
from kadr.request.windows import Span, Windows
from kadr.sampling.blending import blend_window
from kadr.sampling.conditioning import append_keyframe
from kadr.sampling.positions import token_positions
from kadr.sampling.state import LatentState
from kadr.shapes import TEMPORAL_COMPRESSION, LatentGrid

ANCHOR_FRAME = -TEMPORAL_COMPRESSION  # pixel frame of the anchor image: one latent before the window


class Guide(NamedTuple):
    """Latents appended to a window's tokens, as in ComfyUI's LTXVAddGuide, and removed after sampling.

    Args:
        name: name of its noise stream.
        latents: (1, C, n, h, w), normalised.
        first_frame: pixel frame of the window at which the latents start.
        strength: in (0, 1].
    """

    name: str
    latents: Tensor
    first_frame: int
    strength: float

    def append_to(
        self, state: LatentState, resolved_pass: ResolvedPass, *, causal: bool, draw: Callable[[torch.Size], Tensor]
    ) -> LatentState:
        """Returns the state with the guide's tokens appended."""
        grid = LatentGrid(*self.latents.shape[2:])
        positions = token_positions(grid, fps=resolved_pass.fps, causal=causal, first_frame=self.first_frame)
        return append_keyframe(state, self.latents, positions, self.strength, draw(self.latents.shape))


class WindowStore(Protocol):
    """Store of finished windows: the latents each adds to the video, (1, C, n, h, w), fp32, on the CPU."""

    def has(self, index: int) -> bool:
        """Tells if window `index`, from 0, is stored."""

    def store(self, index: int, latents: Tensor) -> None:
        """Stores the latents that window `index`, from 0, adds."""

    def read(self, index: int) -> Tensor:
        """Returns the stored latents of a window. The next window replaces their end, blended with its own start."""


class InMemoryWindowStore:
    """Store of windows that are needed only until the generation ends."""

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
    """Latents of a long video, one tensor (1, C, n, h, w) per window, read when iteration reaches it.

    Args:
        spans: spans of the windows.
        read_window: returns the latents from a window's first output latent on, at least up to the next window's.
    """

    spans: tuple[Span, ...]
    read_window: Callable[[int], Tensor]

    @classmethod
    def from_latents(cls, latents: Tensor, spans: tuple[Span, ...]) -> WindowedLatents:
        """Splits the latents of a whole video, (1, C, f, h, w)."""
        return cls(spans, lambda index: latents[:, :, spans[index].output_start : spans[index].end])

    def __iter__(self) -> Iterator[Tensor]:
        ends = [*(span.output_start for span in self.spans[1:]), self.spans[-1].end]
        for index, (span, end) in enumerate(zip(self.spans, ends, strict=True)):
            yield self.read_window(index)[:, :, : end - span.output_start]

    def to_tensor(self) -> Tensor:
        """Returns the latents of the whole video, (1, C, f, h, w)."""
        return torch.cat(list(self), dim=2)


def missing_windows(store: WindowStore, spans: Sequence[Span]) -> list[int]:
    """Returns the indices of the windows that are not stored."""
    return [index for index in range(len(spans)) if not store.has(index)]


def sample_windows(
    windows: Windows,
    spans: tuple[Span, ...],
    store: WindowStore,
    sample_window: Callable[[int, Sequence[Guide]], Tensor],
    anchor_latents: Tensor | None,
) -> WindowedLatents:
    """Samples and stores the missing windows.

    Stored windows after a missing one stay valid: they were sampled from an identical window.

    Args:
        sample_window: takes a window index, from 0, and the window's guides; returns its latents (1, C, n, h, w).
        anchor_latents: latents (1, C, 1, h, w) of the anchor image; None if there is none.
    """
    _, overlap = windows.latent_frames
    anchor_guides = (
        []
        if anchor_latents is None
        else [Guide("remembered", anchor_latents, ANCHOR_FRAME, float(windows.anchor_strength or 0))]
    )
    for index in missing_windows(store, spans):
        if index == 0:
            store.store(0, sample_window(0, anchor_guides).cpu())
            continue
        previous = store.read(index - 1)
        overlap_guide = Guide("overlap", previous[:, :, -overlap:], 0, windows.overlap_strength)
        latents = sample_window(index, [overlap_guide, *anchor_guides]).cpu()
        store.store(index, blend_window(latents, previous, store.read(0), overlap=overlap, adain_factor=windows.adain))
    return WindowedLatents(spans, store.read)


def rechunk(latents: Iterable[Tensor], chunk_frames: int) -> Iterator[Tensor]:
    """Splits latents (1, C, n, h, w) of any lengths into chunks of `chunk_frames` frames; the last may be shorter."""
    pending: Tensor | None = None
    for piece in latents:
        pending = piece if pending is None else torch.cat([pending, piece], dim=2)
        full_frames = pending.shape[2] // chunk_frames * chunk_frames
        yield from pending[:, :, :full_frames].split(chunk_frames, dim=2) if full_frames else ()
        pending = pending[:, :, full_frames:]
    if pending is not None and pending.shape[2]:
        yield pending
