"""`FrameEncoder`: what `VideoWriter` asks of a format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kadr.media.encoders.formats import Codec, OutputFormat
from kadr.shapes import Size


class Target(NamedTuple):
    """A file that is being made.

    Args:
        partial: the hidden file, or folder, that is written to.
        fps: frames per second, exactly.
        codec, crf: None where the format has none.
    """

    partial: Path
    form: OutputFormat
    size: Size
    fps: Fraction
    codec: Codec | None = None
    crf: int | None = None


class FrameEncoder(ABC):
    """Encodes the frames of one file, in this order: `open`, `encode` for each frame, `finish`; `close` in any case."""

    def __init__(self, target: Target) -> None:
        self.target = target

    @abstractmethod
    def open(self) -> None:
        """Creates the hidden file."""

    def set_comment(self, comment: str) -> None:
        """Says what the file's comment will be as far as it is known before the first frame."""
        del comment  # formats that can take it at the end wait for that

    @abstractmethod
    def encode(self, pixels: np.ndarray) -> None:
        """Appends a frame, uint8 (H, W, 3): RGB, full range."""

    @abstractmethod
    def finish(self, comment: str | None) -> None:
        """Completes the hidden file, with that comment: one line of ASCII."""

    @abstractmethod
    def close(self) -> None:
        """Closes and removes what is left of the hidden file, and does nothing where that is done."""
