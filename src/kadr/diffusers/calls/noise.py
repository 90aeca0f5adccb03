"""Noise of a call: from a script's `torch.Generator`s in the order of diffusers, or from kadr's own streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kadr.errors import RequestError
from kadr.quoting import quote
from kadr.sampling.noise import NoiseSource, NoiseStreams

INITIAL, DECODE, CONDITION, KEYFRAME = "initial", "decode", "condition ", "keyframe "
FLOAT32_NAMES = (INITIAL, CONDITION, KEYFRAME)  # what else is drawn is the VAE's, in its dtype


class GeneratorNoise:
    """Noise of a batch of videos from generators.

    A name is drawn once, for all videos, when it is first reserved. The generator's state before it is stored, so that
    each video, and each retry of a stage, gets the same noise again without the noise being stored.

    Args:
        generators: one for all videos, or one for each.
        batch: number of videos.
        dtype: of the VAE's noise; that of the sampling is float32.
    """

    def __init__(self, generators: Sequence[torch.Generator], batch: int, dtype: torch.dtype) -> None:
        self.generators, self.batch, self.dtype = generators, batch, dtype
        self._states: dict[str, list[tuple[torch.Generator, Tensor]]] = {}
        self._rows: dict[str, int] = {}

    def reserve(self, name: str, shape: Sequence[int], rows: int, generator_index: int | None = None) -> None:
        """Draws the noise of a name, (rows, *shape[1:]), in its turn.

        Args:
            generator_index: of the only generator that draws; None: the one of all videos, or each for its own.
        """
        if name in self._states:
            return
        used = list(self.generators)
        if generator_index is not None or rows == 1:
            used = [used[min(generator_index or 0, len(used) - 1)]]
        self._states[name], self._rows[name] = [(item, item.get_state()) for item in used], rows
        for generator in used:
            self._draw_from(generator, shape, rows if len(used) == 1 else 1, name)

    def draw(self, name: str, shape: Sequence[int]) -> Tensor:
        """Draws the noise of a reserved name again, (rows, *shape[1:])."""
        rows, parts = self._rows[name], []
        for generator, state in self._states[name]:
            now = generator.get_state()
            generator.set_state(state)
            parts.append(self._draw_from(generator, shape, rows if len(self._states[name]) == 1 else 1, name))
            generator.set_state(now)
        return torch.cat(parts)

    def is_reserved(self, name: str) -> bool:
        return name in self._states

    def _draw_from(self, generator: torch.Generator, shape: Sequence[int], rows: int, name: str) -> Tensor:
        dtype = torch.float32 if name.startswith(FLOAT32_NAMES) else self.dtype
        return torch.randn((rows, *shape[1:]), generator=generator, device=generator.device, dtype=dtype)


class VideoNoise:
    """Noise of one video of a batch, as a generation draws it.

    Args:
        index: of the video.
        video_tokens: number of tokens of the video; diffusers has those of keyframes before them, kadr behind.
        streams: for noise that diffusers draws from torch's global generator.
    """

    def __init__(self, noise: GeneratorNoise, index: int, video_tokens: int, streams: NoiseStreams) -> None:
        self._noise, self._index, self._video_tokens, self._streams = noise, index, video_tokens, streams

    def draw(self, name: str, shape: Sequence[int]) -> Tensor:
        """Returns the noise of this video, of a name and a shape (1, ...)."""
        if name.startswith(CONDITION) or name == DECODE:
            self._noise.reserve(name, shape, self._noise.batch)
        if not self._noise.is_reserved(name):
            return self._streams.draw(name, shape)
        rows = self._noise.draw(name, shape)
        noise = rows[self._index : self._index + 1] if len(rows) > 1 else rows
        if name.startswith(CONDITION):
            noise = torch.cat([noise[:, -self._video_tokens :], noise[:, : -self._video_tokens]], dim=1)
        return noise


def check_generators(generator: Any, batch: int) -> list[torch.Generator]:
    """Returns the generators of a call; [] for None.

    Raises:
        RequestError: it is not one, or there are neither one nor as many as videos.
    """
    if generator is None:
        return []
    generators = list(generator) if isinstance(generator, list | tuple) else [generator]
    if not all(isinstance(item, torch.Generator) for item in generators):
        raise RequestError(f"generator is {quote(generator)}; it must be a torch.Generator, or a list of them.")
    if len(generators) not in (1, batch):
        raise RequestError(f"{len(generators)} generators are given for {batch} videos; give one, or one for each.")
    return generators


def streams_of(index: int, seed: int) -> NoiseStreams:
    """Returns kadr's own noise of one video of a batch."""
    return NoiseStreams(seed + index)


def video_noise(noise: GeneratorNoise | None, index: int, video_tokens: int, seed: int) -> NoiseSource:
    """Returns the noise of one video: from the generators, or where there are none from kadr's streams."""
    streams = streams_of(index, seed)
    return streams if noise is None else VideoNoise(noise, index, video_tokens, streams)
