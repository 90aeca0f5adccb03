"""Animated WebP images: small enough for a preview at every step."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

_QUALITY, _EFFORT = 60, 0  # such an image is there for a moment: smaller files would take longer to make


def encode_webp(frames: np.ndarray, seconds: float) -> bytes:
    """Returns frames uint8 (F, H, W, 3) as an animated WebP that plays in so many seconds, again and again."""
    first, *others = (Image.fromarray(frame) for frame in frames)
    content = BytesIO()
    first.save(
        content,
        "WEBP",
        save_all=True,
        append_images=others,
        duration=max(20, round(1000 * seconds / len(frames))),
        loop=0,
        quality=_QUALITY,
        method=_EFFORT,
    )
    return content.getvalue()
