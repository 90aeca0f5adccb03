"""Noise from named streams of one seed.

Every use of noise has its own stream, drawn on the CPU in fp32. So a seed gives the same noise on every device, and
adding, removing or reordering one use changes no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class NoiseSource(Protocol):
    """The source of a generation's noise. A retried stage draws again: a name must always give the same noise."""

    def draw(self, name: str, shape: Sequence[int]) -> Tensor:
        """Returns standard normal noise of a name and a shape, on any device."""
        ...


@dataclass(frozen=True)
class NoiseStreams:
    """The noise streams of a seed (any whole number)."""

    seed: int

    def draw(self, name: str, shape: Sequence[int]) -> Tensor:
        """Returns standard normal noise, fp32, on the CPU: always the same for a seed, a name and a shape."""
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        return torch.randn(tuple(shape), generator=generator)


def move_noise(noise: Tensor, device: torch.device) -> Tensor:
    """Moves noise to a device. The host does not wait for a GPU."""
    if device.type == "cuda" and noise.device.type == "cpu":
        noise = noise.pin_memory()  # else the copy would wait for all work before it
    return noise.to(device, non_blocking=device.type == "cuda")
