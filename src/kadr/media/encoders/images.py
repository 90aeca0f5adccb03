"""One image for each frame: frame-%04d.png, or a single frame."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from kadr.media.encoders.encoder import FrameEncoder, Target
from kadr.media.encoders.formats import PNG
from kadr.media.encoders.tags import write_comment

FRAME_JPEG_QUALITY = 95


class ImageEncoder(FrameEncoder):
    """Writes numbered images into the hidden folder `target.partial`."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.frames_encoded = 0

    def open(self) -> None:
        """See `FrameEncoder.open`."""
        self.target.partial.mkdir()

    def encode(self, pixels: np.ndarray) -> None:
        """See `FrameEncoder.encode`."""
        from PIL import Image

        self.frames_encoded += 1
        path = self.hidden_path(self.frames_encoded)
        options: dict[str, Any] = {} if self.target.form is PNG else {"quality": FRAME_JPEG_QUALITY, "subsampling": 0}
        Image.fromarray(pixels).save(path, **options)

    def hidden_path(self, number: int) -> Path:
        """Returns the hidden file of a frame; number: from 1."""
        return self.target.partial / f"{number}{self.target.form.suffixes[0]}"

    def finish(self, comment: str | None) -> None:
        """See `FrameEncoder.finish`. Every image has the comment."""
        if comment is not None:
            for number in range(1, self.frames_encoded + 1):
                write_comment(self.hidden_path(number), comment)

    def close(self) -> None:
        """See `FrameEncoder.close`."""
        shutil.rmtree(self.target.partial, ignore_errors=True)
