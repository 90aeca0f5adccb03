"""Bytes that an image or a frame of a clip takes while it is prepared for the VAE encoder; see `media.prepare`."""

from __future__ import annotations

from pathlib import Path

from kadr.media.image import largest_within, reduction_factor
from kadr.request.pass_media import PassControl, PassFrames

DECODED_BYTES = 4  # of a pixel: Pillow has three channels of a colour in four bytes
CROPPED_BYTES = 3  # of a pixel, as an array
# The array that is resized, and what it is filled from. The H.264 encoder, which is done by then, takes less: about 12.
FLOAT_BYTES = 3 * 4 + 3
IMAGE_LIBRARY_BYTES = 50_000_000  # of the libraries that read and compress images, once they are loaded. Measured.
REDUCED_BY_READER = (".jpg", ".jpeg")  # such a file is reduced while it is decoded; others are decoded whole before


def prepare_bytes(use: PassFrames | PassControl) -> int:
    """Returns the bytes that preparing an image, or one frame of a clip, takes at its peak."""
    media = use.media
    factor = reduction_factor(media.width, media.height)
    width, height = -(-media.width // factor), -(-media.height // factor)
    decoded = width * height
    if factor > 1 and Path(media.path).suffix.lower() not in REDUCED_BY_READER:
        decoded += media.width * media.height
    cropped_pixels, padded_pixels = _pixels(use, width, height)
    phases = (
        DECODED_BYTES * decoded,
        DECODED_BYTES * width * height + CROPPED_BYTES * cropped_pixels,
        CROPPED_BYTES * cropped_pixels + (FLOAT_BYTES - CROPPED_BYTES) * padded_pixels,
    )
    return IMAGE_LIBRARY_BYTES + max(phases)


def prepare_pixels(use: PassFrames | PassControl) -> int:
    """Returns the pixels of an image, or of a frame, that are blurred and compressed."""
    factor = reduction_factor(use.media.width, use.media.height)
    return _pixels(use, use.media.width // factor, use.media.height // factor)[0]


def _pixels(use: PassFrames | PassControl, width: int, height: int) -> tuple[int, int]:
    """Returns the pixels of the cropped image, without and with its margins."""
    size = use.size
    if isinstance(use, PassFrames) and use.resize:
        cropped_width, cropped_height = size.width, size.height
    else:
        cropped_width, cropped_height = largest_within(width, height, size.width / size.height)
    left, right, top, bottom = size.padding()
    return cropped_width * cropped_height, (cropped_width + left + right) * (cropped_height + top + bottom)
