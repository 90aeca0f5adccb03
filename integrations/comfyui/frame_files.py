"""IMAGE batches as files without loss, for a request: kadr takes images and clips by path."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .media_nodes import FrameCondition, FrameControl

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def to_pixels(images: Tensor) -> np.ndarray:
    """Returns an IMAGE batch, float (F, H, W, 3) in 0..1, as uint8 of the same shape, rounded.

    Raises:
        ValueError: it has another shape, such as that with an alpha channel.
    """
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[3] != 3 or not all(shape):
        raise ValueError(
            f"an image batch is {shape}; it must be (frames, height, width, 3). An alpha channel is taken off by Split "
            "Image with Alpha."
        )
    pixels: np.ndarray = images.detach().mul(255).round().clamp(0, 255).byte().cpu().numpy()
    return pixels


class FrameFiles:
    """Files of a request, in a folder that is removed after it. The same batch is written once.

    Args:
        fps: frames per second of clips.
    """

    def __init__(self, folder: Path, fps: float) -> None:
        self._folder, self._fps = folder, fps
        self._paths: dict[tuple[int, str], Path] = {}

    def write(self, images: Tensor) -> str:
        """Writes a batch, a .png of one image and an .mkv of several, and returns the path."""
        suffix = ".png" if len(images) == 1 else ".mkv"
        return self._write(images, suffix)

    def write_clip(self, images: Tensor) -> str:
        """Writes a batch of any number of images as an .mkv, and returns the path."""
        return self._write(images, ".mkv")

    def _write(self, images: Tensor, suffix: str) -> str:
        from kadr import Size
        from kadr.media.writer import VideoWriter

        path = self._paths.setdefault((id(images), suffix), self._folder / f"{len(self._paths)}{suffix}")
        if not path.exists():
            pixels = to_pixels(images)
            with VideoWriter(path, Size(pixels.shape[2], pixels.shape[1]), self._fps) as writer:
                writer.write(pixels)
        return str(path)

    def conditions(self, conditions: Iterable[FrameCondition]) -> tuple[Any, ...]:
        """Returns `kadr.Condition`s of the files."""
        from kadr import Condition

        return tuple(
            Condition(self.write(item.images), frame=item.frame, strength=item.strength) for item in conditions
        )

    def controls(self, controls: Iterable[FrameControl]) -> tuple[Any, ...]:
        """Returns `kadr.Control`s of the files."""
        from kadr import Control

        return tuple(Control(self.write(item.images), kind=item.kind) for item in controls)
