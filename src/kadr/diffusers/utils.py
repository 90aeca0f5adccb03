"""Helpers that scripts import from `diffusers.utils`: `export_to_video`, `load_image` and `load_video`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kadr.diffusers.lora import refuse_options
from kadr.errors import MediaError
from kadr.media.clip import read_video
from kadr.media.image import load_image as open_image
from kadr.media.writer import VideoWriter
from kadr.quoting import quote
from kadr.shapes import Size

__all__ = ["export_to_video", "load_image", "load_video"]


def export_to_video(
    video_frames: Sequence[Any] | np.ndarray, output_video_path: str | None = None, fps: float = 10, **options: Any
) -> str:
    """Writes frames to a file, whose ending decides on the format, and returns its path.

    Args:
        video_frames: Pillow images, arrays (H, W, 3), or tensors (3, H, W) as `output_type="pt"` returns them; floats
            in [0, 1] or uint8.
        output_video_path: None makes a file in the folder for temporary ones.
        options: `macro_block_size` changes nothing: no frame is resized. `quality` and `bitrate` are refused.

    Raises:
        MediaError: there are no frames, or the file cannot be written.
        RequestError: an option that kadr does not take.
    """
    refuse_options(
        "export_to_video", options, harmless=("macro_block_size",), hint="kadr.Video.save takes codec and crf."
    )
    frames = [_to_uint8(frame) for frame in video_frames]
    if not frames:
        raise MediaError("there are no frames to write; give at least one.")
    if output_video_path is None:
        output_video_path = str(Path(tempfile.mkdtemp(prefix="kadr-")) / "video.mp4")
    height, width = frames[0].shape[:2]
    with VideoWriter(output_video_path, Size(width, height), fps, frames=len(frames)) as writer:
        writer.write(np.stack(frames))
    return output_video_path


def load_image(
    image: str | Path | Image.Image, convert_method: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """Opens an image file upright, as RGB or as `convert_method` returns it.

    Raises:
        MediaError: it cannot be read, or is a link.
    """
    _refuse_link(image)
    opened = open_image(image)
    return opened if convert_method is None else convert_method(opened)


def load_video(
    video: str | Path,
    convert_method: Callable[[list[Image.Image]], list[Image.Image]] | None = None,
    return_fps: bool = False,
) -> Any:
    """Reads the frames of a clip as Pillow images; with `return_fps`, also its frame rate.

    Raises:
        MediaError: it cannot be read, or is a link.
    """
    _refuse_link(video)
    clip = read_video(video)
    images = [Image.fromarray(frame) for frame in clip.frames]
    images = images if convert_method is None else convert_method(images)
    return (images, float(clip.fps)) if return_fps else images


def _refuse_link(path: Any) -> None:
    if str(path).startswith(("http://", "https://")):
        raise MediaError(f"{quote(str(path))} is a link; kadr opens no links. Download the file and pass its path.")


def _to_uint8(frame: Any) -> np.ndarray:
    if isinstance(frame, torch.Tensor):
        frame = frame.movedim(0, -1).cpu()
        frame = frame.float() if frame.is_floating_point() else frame  # numpy has no bfloat16
    pixels = np.asarray(frame)
    return pixels if pixels.dtype == np.uint8 else (pixels.clip(0, 1) * 255).astype(np.uint8)
