"""Control maps: edges of frames, and control frames fitted to the size of the reference that is encoded.

They are drawings, not camera footage: none is blurred or passed through H.264, as conditioning images are. The trainer
of the released in-context LoRAs (Lightricks' LTX-Video-Trainer) encodes its reference videos without that too.
"""

from __future__ import annotations

import importlib
from math import ceil
from typing import Any

import numpy as np
import torch
from PIL import Image

from kadr.errors import RequestError
from kadr.media.image import ImageInput, Notify, crop_to_aspect, load_image
from kadr.shapes import Size

CANNY_LOW, CANNY_HIGH = 100, 200  # Canny's thresholds, of the trainer


def canny_edges(image: np.ndarray) -> np.ndarray:
    """Draws Canny edges as the trainer of the released canny LoRA does: white on black, one pixel wide.

    Args:
        image: uint8 (H, W, 3), RGB.

    Returns:
        uint8 (H, W, 3), each pixel 0 or 255.

    Raises:
        RequestError: OpenCV is not installed.
    """
    cv2 = import_optional("cv2", "control")
    edges = cv2.Canny(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY), CANNY_LOW, CANNY_HIGH)
    return np.repeat(edges[..., None], 3, axis=2)


def fit_to_reference(
    image: ImageInput,
    size: Size,
    reference_size: Size,
    *,
    name: str = "the control",
    notify: Notify | None = None,
) -> np.ndarray:
    """Fits a control frame to the size of a reference: its largest centred crop with the aspect of the video.

    The padding that the video is made with is filled with the outermost pixels: black padding would show an edge.

    Args:
        size: of the video, as requested.
        reference_size: of the reference; it covers `size` and its padding.
        name: of the image in messages.
        notify: see `load_image`.

    Returns:
        uint8 (reference_size.height, reference_size.width, 3). An image that has this size already stays as it is.

    Raises:
        MediaError: the image cannot be read, or is too small.
    """
    cropped = crop_to_aspect(load_image(image, notify), size, name=name)
    across, down = cropped.width / size.width, cropped.height / size.height  # image pixels per pixel of the video
    left, right, top, bottom = (
        margin * scale for margin, scale in zip(size.padding(), (across, across, down, down), strict=True)
    )
    padding = ((ceil(top), ceil(bottom)), (ceil(left), ceil(right)), (0, 0))
    padded = Image.fromarray(np.pad(np.asarray(cropped), padding, mode="edge"))
    x, y = ceil(left), ceil(top)
    box = (x - left, y - top, x + cropped.width + right, y + cropped.height + bottom)
    return np.asarray(padded.resize((reference_size.width, reference_size.height), box=box))


def normalize_image(image: np.ndarray) -> torch.Tensor:
    """Converts uint8 (H, W, 3) to the VAE encoder's float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def import_optional(module_name: str, extra: str) -> Any:
    """Imports a library that comes with an extra of kadr.

    Raises:
        RequestError: it is not installed.
    """
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        raise RequestError(
            f"this kind of control needs {module_name}, which is not installed: pip install 'kadr[{extra}]'. Or pass a "
            "clip of finished control maps, with no kind before its path."
        ) from error
