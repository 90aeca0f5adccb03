"""Images and clips of a script as pixels for the VAE: resized by Lanczos, without kadr's crop, blur and compression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kadr.errors import RequestError
from kadr.quoting import quote
from kadr.shapes import TEMPORAL_COMPRESSION, Size

FORMS = "a Pillow image, a float array (H, W, 3) or a float tensor (3, H, W) in [0, 1], or a list of them"


def image_pixels(image: Any, size: Size) -> Tensor:
    """Returns images as float32 (n, 3, H, W) in [-1, 1] at `size`.

    Source: VaeImageProcessor.preprocess of diffusers: both sides are stretched, the aspect is not kept.

    Raises:
        RequestError: it is not an image, or a list of images of one kind.
    """
    images = list(image) if isinstance(image, list | tuple) else [image]
    if images and all(isinstance(item, Image.Image) for item in images):
        return _from_pillow(images, size)
    if images and all(isinstance(item, np.ndarray) for item in images):
        tensors = [torch.from_numpy(np.ascontiguousarray(item)).float().movedim(-1, -3) for item in images]
        return _from_tensors(tensors, size)
    if images and all(isinstance(item, Tensor) for item in images):
        return _from_tensors([item.float().cpu() for item in images], size)
    raise RequestError(f"the image is {quote(image)}; it must be {FORMS}.")


def clip_pixels(video: Any, size: Size, max_frames: int | None = None) -> Tensor:
    """Returns a clip as float32 (1, 3, F, H, W) in [-1, 1] at `size`.

    Args:
        video: its frames, each as `image_pixels` takes it.
        max_frames: that are used, the first ones, trimmed to 8k+1; None uses all.

    Raises:
        RequestError: it is empty, or its frames are not images.
    """
    frames: Any = list(video) if isinstance(video, Sequence | np.ndarray | Tensor) and len(video) else None
    if frames is None:
        raise RequestError(f"the video is {quote(video)}; it must be a list of frames, each {FORMS}.")
    if len(frames) == 1 and getattr(frames[0], "ndim", 0) == 4:  # a batch of one video
        frames = list(frames[0])
    if max_frames is not None:
        frames = frames[: (min(len(frames), max_frames) - 1) // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION + 1]
    return image_pixels(frames, size).transpose(0, 1)[None]


def _from_pillow(images: Sequence[Image.Image], size: Size) -> Tensor:
    resized = [item.resize((size.width, size.height), Image.Resampling.LANCZOS).convert("RGB") for item in images]
    pixels = np.stack([np.asarray(item, dtype=np.float32) / 255.0 for item in resized])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() * 2.0 - 1.0


def _from_tensors(tensors: Sequence[Tensor], size: Size) -> Tensor:
    pixels = torch.cat([item if item.ndim == 4 else item[None] for item in tensors])
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise RequestError(f"the image has the shape {tuple(tensors[0].shape)}; it must be {FORMS}.")
    if pixels.shape[-2:] != (size.height, size.width):
        pixels = F.interpolate(pixels, size=(size.height, size.width))
    return pixels if bool(pixels.min() < 0) else pixels * 2.0 - 1.0
