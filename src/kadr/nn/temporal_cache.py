"""What the temporal layers of one pass over a video remember from chunk to chunk.

A video goes through the VAE in chunks of any length, first frame first. Each layer that looks across time keeps the
frames it still needs, so that any way of cutting the video into chunks computes the same numbers; the whole video at
once is a stream of one chunk. Tensors are (B, C, F, H, W); F may be 0 where a layer still waits for its next frame.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

NoiseSource = Callable[[tuple[int, ...]], Tensor]


def cat_frames(*parts: Tensor) -> Tensor:
    """Frames (B, C, F, H, W) of several tensors, one after the other, channels last in memory if the last part is.

    `torch.cat` puts the channels first as soon as one part says nothing of its order, as a repeated frame does, and
    from there on every sum has to reorder.
    """
    if parts[-1].movedim(1, -1).is_contiguous():
        return torch.cat([part.movedim(1, -1) for part in parts], dim=1).movedim(-1, 1)
    return torch.cat(parts, dim=2)


class TemporalCache:
    """The memory of one pass.

    Args:
        is_last_chunk: the chunk now going through ends the video. Set it before the last chunk.
        noise_source: draws standard normal noise of a shape, for decoders with noise injection.
    """

    def __init__(self, *, is_last_chunk: bool = False, noise_source: NoiseSource | None = None) -> None:
        self.is_last_chunk = is_last_chunk
        self._noise_source = noise_source
        self._frames: dict[Hashable, Tensor] = {}
        self._noise_maps: dict[Hashable, Tensor] = {}

    @classmethod
    def single_chunk(cls, noise_source: NoiseSource | None = None) -> TemporalCache:
        """The stream of a video that comes as one chunk."""
        return cls(is_last_chunk=True, noise_source=noise_source)

    def get(self, owner: Hashable) -> Tensor | None:
        """What `owner` kept from the chunk before; None before its first frame."""
        return self._frames.get(owner)

    def store(self, owner: Hashable, x: Tensor) -> None:
        """Keep `x` for `owner` until the next chunk, where the frames of the chunk before lay if they are as many.

        Copied, or a view would hold the whole chunk in memory. In the same place, because what stays long among what
        comes and goes leaves holes in the heap that nothing fits.
        """
        if self.is_last_chunk:
            return
        kept = self._frames.get(owner)
        if kept is None or kept.shape != x.shape:
            self._frames[owner] = x.clone()
        else:
            kept.copy_(x)

    def prepend(self, owner: Hashable, x: Tensor) -> Tensor:
        """The frames `owner` kept, followed by `x`."""
        kept = self.get(owner)
        return x if kept is None or not kept.shape[2] else cat_frames(kept, x)

    def delay(self, owner: Hashable, x: Tensor, frames: int) -> Tensor:
        """The oldest `frames` frames not yet returned: holds a skip path back until the main path has caught up."""
        x = self.prepend(owner, x)
        self.store(owner, x[:, :, frames:])
        return x[:, :, :frames]

    def is_first(self, owner: Hashable, x: Tensor) -> bool:
        """True once: when the first frame of the video reaches `owner` in `x`."""
        if not x.shape[2] or owner in self._frames:
            return False
        self._frames[owner] = x.new_empty(0)
        return True

    def get_noise(self, owner: Hashable, like: Tensor) -> Tensor:
        """Noise (H, W) for `owner`: drawn once, the same for every frame, channel and sample of the video."""
        if owner not in self._noise_maps:
            if self._noise_source is None:
                raise ValueError("this decoder injects noise: give its stream a source of noise")
            self._noise_maps[owner] = self._noise_source(tuple(like.shape[-2:])).to(like)
        return self._noise_maps[owner]
