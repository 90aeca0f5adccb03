"""Temporal cache: the frames that temporal layers of the VAE keep from chunk to chunk.

A video goes through the VAE in chunks of any length, in order. Each temporal layer keeps the frames that it still
needs, so the numbers do not depend on the chunk lengths; a whole video is one chunk. Tensors are (B, C, F, H, W); F may
be 0 while a layer waits for its next frame.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

NoiseSource = Callable[[tuple[int, ...]], Tensor]


def cat_frames(*parts: Tensor) -> Tensor:
    """Concatenates frames (B, C, F, H, W) in time; the output is channels last in memory if the last part is.

    `torch.cat` falls back to channels first if the layout of a part is ambiguous, as that of a repeated frame is, and
    every later addition then has to reorder.
    """
    if parts[-1].movedim(1, -1).is_contiguous():
        return torch.cat([part.movedim(1, -1) for part in parts], dim=1).movedim(-1, 1)
    return torch.cat(parts, dim=2)


class TemporalCache:
    """Frames and noise that layers keep while one video goes through. An owner is any hashable key of a layer.

    Args:
        is_last_chunk: the current chunk ends the video. Set it before the last chunk.
        noise_source: draws standard normal noise of a shape, for decoders that inject noise.
    """

    def __init__(self, *, is_last_chunk: bool = False, noise_source: NoiseSource | None = None) -> None:
        self.is_last_chunk = is_last_chunk
        self._noise_source = noise_source
        self._frames: dict[Hashable, Tensor] = {}
        self._noise_maps: dict[Hashable, Tensor] = {}

    @classmethod
    def single_chunk(cls, noise_source: NoiseSource | None = None) -> TemporalCache:
        """Returns a cache for a video that is one chunk."""
        return cls(is_last_chunk=True, noise_source=noise_source)

    def get(self, owner: Hashable) -> Tensor | None:
        """Returns the frames that `owner` stored in the chunk before; None before its first frame."""
        return self._frames.get(owner)

    def store(self, owner: Hashable, x: Tensor) -> None:
        """Stores a copy of `x` for `owner` until the next chunk, in the memory of the last copy if the shape is equal.

        A view would keep the whole chunk in memory. The memory is reused because long-lived allocations between
        short-lived ones fragment the heap.
        """
        if self.is_last_chunk:
            return
        cached = self._frames.get(owner)
        if cached is None or cached.shape != x.shape:
            self._frames[owner] = x.clone()
        else:
            cached.copy_(x)

    def prepend(self, owner: Hashable, x: Tensor) -> Tensor:
        """Returns the frames that `owner` stored, followed by `x`."""
        cached = self.get(owner)
        return x if cached is None or not cached.shape[2] else cat_frames(cached, x)

    def delay(self, owner: Hashable, x: Tensor, frames: int) -> Tensor:
        """Returns the oldest `frames` frames not yet returned: delays a skip connection as its main path is delayed."""
        x = self.prepend(owner, x)
        self.store(owner, x[:, :, frames:])
        return x[:, :, :frames]

    def is_first(self, owner: Hashable, x: Tensor) -> bool:
        """Returns True once: when `x` has the first frame of the video for `owner`."""
        if not x.shape[2] or owner in self._frames:
            return False
        self._frames[owner] = x.new_empty(0)
        return True

    def get_noise(self, owner: Hashable, like: Tensor) -> Tensor:
        """Returns noise (H, W) for `owner`, drawn once for all frames, channels and samples of the video."""
        if owner not in self._noise_maps:
            if self._noise_source is None:
                raise ValueError("this decoder injects noise: pass a noise_source")
            self._noise_maps[owner] = self._noise_source(tuple(like.shape[-2:])).to(like)
        return self._noise_maps[owner]
