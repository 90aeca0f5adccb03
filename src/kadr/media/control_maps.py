"""Pictures that a video is made to follow: edges, and frames brought to the size of the reference that is encoded.

They are drawings, not film: none is blurred or passed through H.264, as pictures that a video shows are. The trainer of
the released in-context LoRAs (Lightricks' LTX-Video-Trainer) gives its reference videos to the encoder so, too.
"""

from __future__ import annotations

import importlib
from math import ceil
from typing import Any

import numpy as np
import torch
from PIL import Image

from kadr.errors import RequestError
from kadr.media.image import ImageInput, crop_to_aspect, load_image
from kadr.shapes import Size

CANNY_LOW, CANNY_HIGH = 100, 200  # Canny's thresholds, of the trainer


def canny_edges(image: np.ndarray) -> np.ndarray:
    """The edges of a picture, as the trainer of the released canny LoRA draws them: white on black, one pixel wide.

    Args:
        image: uint8 (H, W, 3), RGB.

    Returns:
        uint8 (H, W, 3), each pixel 0 or 255.

    Raises:
        RequestError: OpenCV is not installed.
    """
    cv2 = import_optional("cv2", "control")
    found = cv2.Canny(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY), CANNY_LOW, CANNY_HIGH)
    return np.repeat(found[..., None], 3, axis=2)


def fit_to_reference(image: ImageInput, size: Size, reference_size: Size, *, name: str = "the control") -> np.ndarray:
    """A picture at the size of a reference: its largest centred part with the aspect of the video.

    The margins that a video is made with are filled with the picture's outermost pixels: a frame around it would be
    edges.

    Args:
        size: of the video, as it was asked for.
        reference_size: of the reference; it shows `size` with its margins.
        name: what a message calls the picture.

    Returns:
        uint8 (made.height, made.width, 3). Every pixel is the picture's own where it has that size already.

    Raises:
        MediaError: it cannot be read, or is too small.
    """
    cropped = crop_to_aspect(load_image(image), size, name=name)
    across, down = cropped.width / size.width, cropped.height / size.height  # its pixels for one of the video's
    left, right, top, bottom = (
        margin * scale for margin, scale in zip(size.padding(), (across, across, down, down), strict=True)
    )
    padding = ((ceil(top), ceil(bottom)), (ceil(left), ceil(right)), (0, 0))
    padded = Image.fromarray(np.pad(np.asarray(cropped), padding, mode="edge"))
    x, y = ceil(left), ceil(top)
    box = (x - left, y - top, x + cropped.width + right, y + cropped.height + bottom)
    return np.asarray(padded.resize((reference_size.width, reference_size.height), box=box))


def normalize_image(image: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) as the encoder takes it: float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def import_optional(module_name: str, extra: str) -> Any:
    """A library that comes with an extra of kadr.

    Raises:
        RequestError: it is not installed.
    """
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        raise RequestError(
            f"this kind of control is made with {module_name}, which is not installed: pip install 'kadr[{extra}]'. Or give "
            "a clip that is made already, with no kind in front of its path."
        ) from error
