"""Prepares a conditioning image: crop, blur, compress, pad.

The model was trained on frames of compressed videos, so a crisp photograph makes it stand still. The official package
therefore blurs every conditioning image and passes it through H.264 first; without this, image-to-video barely moves.
Every number here follows `load_image_to_tensor_with_resize_and_crop`, `calculate_padding` and `crf_compressor` of the
official package ltx_video 0.1.2, operation by operation: the truncation before H.264 turns a last-bit difference into a
whole grey level.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from kadr.errors import MediaError
from kadr.media.writer import MAX_CRF
from kadr.regular_file import require_regular
from kadr.shapes import Size
from kadr.validation import is_whole_number

ImageInput: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray"

DEFAULT_IMAGE_CRF = 29

# Listed because Pillow would otherwise also try formats that start other programs, such as EPS.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_SUPPORTED_IMAGES = "Supported: PNG, JPEG, WebP, BMP, TIFF, GIF and PPM with 8 bits per channel."
_HIGH_BIT_DEPTH_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION_TAG, _FIRST_SIDEWAYS = 0x0112, 5  # of EXIF: orientations from 5 on exchange width and height
# Raised by Pillow's readers on damaged files; most are meant for their own dispatch and leak through.
_READ_ERRORS = (OSError, SyntaxError, ValueError, IndexError, KeyError, struct.error, Image.DecompressionBombError)


def prepare_image(
    image: ImageInput,
    size: Size,
    crf: int = DEFAULT_IMAGE_CRF,
    sampled_size: Size | None = None,
    *,
    resize: bool = False,
) -> torch.Tensor:
    """Prepares an image for the VAE encoder.

    Args:
        image: a path, a Pillow image, or uint8 (H, W, 3) RGB.
        size: the requested size, before snapping to 32: the image is cropped to its aspect.
        crf: H.264 quality of the compression, 1 (best) to 51; 0 leaves it out.
        sampled_size: the size of the pass that uses the image, if it is not `size.snap()`, as in two passes.
        resize: resize the image to `size` before it is blurred and compressed, as frames of an input video are;
            conditions are compressed at their own resolution.

    Returns:
        float32 (1, 3, 1, H, W) in [-1, 1] at `sampled_size`; the padding is 0, a middle grey.

    Raises:
        MediaError: the image is missing, damaged, of an unsupported format or too small; or `crf` is out of range.

    Source: ltx_video/inference.py. As in the official code, the padding is computed in output pixels but added
    before the image is resized. kadr keeps this bug; it has no effect if width and height are multiples of 32.
    """
    sampled_size = sampled_size or size.snap()
    cropped = crop_to_aspect(load_image(image), size, name=_display_name(image))
    if resize:
        cropped = cropped.resize((size.width, size.height))
    unit = compress(blur(_to_tensor(cropped)), crf)
    normalized = unit * 255.0 / 127.5 - 1.0
    padded = F.pad(normalized[None], size.padding())
    if padded.shape[-2:] != (sampled_size.height, sampled_size.width):
        padded = F.interpolate(
            padded, size=(sampled_size.height, sampled_size.width), mode="bilinear", align_corners=False
        )
    return padded.unsqueeze(2)


def load_image(image: ImageInput) -> Image.Image:
    """Opens an image as RGB, upright by its EXIF orientation; transparency is dropped, as in the official package.

    That package ignores the orientation, so the model sees a phone's portrait photograph on its side.

    Raises:
        MediaError: the image is missing, damaged, empty, or of an unsupported format.
    """
    name = _display_name(image)
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    with _translate_errors(name):
        return _open_upright(image, name)


def probe_image(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Returns the width and height of an image, upright as in `load_image`. No pixel is decoded.

    Raises:
        MediaError: the image is missing, empty, or of an unsupported format.
    """
    name = _display_name(path)
    with _translate_errors(name), _open_image(path) as file:
        _refuse_unsupported(file, name)
        width, height = file.size
        is_on_its_side = file.getexif().get(_ORIENTATION_TAG, 1) >= _FIRST_SIDEWAYS
        return (height, width) if is_on_its_side else (width, height)


@contextmanager
def _translate_errors(name: str) -> Iterator[None]:
    """Turns what Pillow raises in the block into MediaErrors about the image `name`."""
    try:
        yield
    except FileNotFoundError:
        raise MediaError(f"{name}: there is no such file.") from None
    except UnidentifiedImageError:
        raise MediaError(f"{name} is not a readable image. {_SUPPORTED_IMAGES}") from None
    except _READ_ERRORS as error:
        raise MediaError(f"{name} cannot be read as an image: {error}. {_SUPPORTED_IMAGES}") from error


def crop_to_aspect(image: Image.Image, size: Size, *, name: str = "the image") -> Image.Image:
    """Crops the largest centred part with the aspect of `size`, at the image's own resolution.

    Args:
        name: of the image in messages.

    Raises:
        MediaError: less than 2x2 pixels would be left.
    """
    width, height = image.size
    cropped_width, cropped_height = check_crop(width, height, size, name=name)
    left, top = (width - cropped_width) // 2, (height - cropped_height) // 2
    return image.crop((left, top, left + cropped_width, top + cropped_height))


def check_crop(width: int, height: int, size: Size, *, name: str) -> tuple[int, int]:
    """Returns the width and height of the largest part of an image with the aspect of `size`.

    Args:
        name: of the image in messages.

    Raises:
        MediaError: less than 2x2 pixels would be left.
    """
    cropped_width, cropped_height = _largest_within(width, height, size.width / size.height)
    if min(cropped_width, cropped_height) < 2:
        raise MediaError(
            f"{name} is {width}x{height} pixels; cropped to the aspect of {size} it has "
            f"{cropped_width}x{cropped_height}, and at least 2x2 are needed. Use a larger image or a size of a similar "
            "aspect."
        )
    return cropped_width, cropped_height


def _largest_within(width: int, height: int, aspect: float) -> tuple[int, int]:
    """Returns the width and height of the largest part with that aspect."""
    if width / height > aspect:
        return int(height * aspect), height
    return width, int(width / aspect)


def blur(image: torch.Tensor) -> torch.Tensor:
    """Blurs with a 3x3 Gaussian of standard deviation 1 (.27407, .45186, .27407), mirrored at the edges.

    Args:
        image: float32 (3, H, W), both sides at least 2.

    Source: torchvision's gaussian_blur(kernel_size=3, sigma=1). One 3x3 kernel, not two passes of 3: the sums differ in
    the last bit, which the truncation in `compress` turns into a whole grey level.
    """
    weights = torch.linspace(-1, 1, 3, dtype=image.dtype, device=image.device).square().mul(-0.5).exp()
    weights = weights / weights.sum()
    kernel = (weights[:, None] * weights).expand(3, 1, 3, 3)
    mirrored = F.pad(image[None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(mirrored, kernel, groups=3)[0]


def compress(image: torch.Tensor, crf: int = DEFAULT_IMAGE_CRF) -> torch.Tensor:
    """Encodes an image as one frame of H.264, and decodes it again; an odd side loses its last pixel.

    Args:
        image: float32 (3, H, W) in [0, 1], as is the result.
        crf: 1 (best) to 51; 0 returns the image as it is.

    Raises:
        MediaError: `crf` is out of range, or the encoder refuses the size.

    Source: ltx_video/pipelines/crf_compressor.py.
    """
    if not is_whole_number(crf) or not 0 <= crf <= MAX_CRF:
        raise MediaError(f"crf is {crf}; it must lie between 1 (best) and {MAX_CRF}, or be 0 for no compression.")
    if crf == 0:
        return image
    even = image[:, : image.shape[1] // 2 * 2, : image.shape[2] // 2 * 2]
    pixels = (even * 255.0).to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    return torch.from_numpy(_h264_roundtrip(pixels, crf)).to(image).permute(2, 0, 1) / 255.0


def _h264_roundtrip(pixels: np.ndarray, crf: int) -> np.ndarray:
    """Encodes and decodes uint8 (H, W, 3), with the settings and plain colour conversions of the official package."""
    import av

    height, width, _ = pixels.shape
    try:
        with av.open(_encode_h264(pixels, crf), "r") as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb24")
    except av.error.FFmpegError as error:
        raise MediaError(
            f"an image of {width}x{height} pixels cannot be compressed as H.264: {error.strerror}. "
            "Make it smaller, or set crf to 0 for no compression."
        ) from error


def _encode_h264(pixels: np.ndarray, crf: int) -> io.BytesIO:
    """Encodes uint8 (H, W, 3) as an MP4 file of one frame."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height = pixels.shape[1], pixels.shape[0]
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode())
    file.seek(0)
    return file


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """Converts to float32 (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


def _from_array(image: np.ndarray, name: str) -> Image.Image:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise MediaError(f"{name} is an array {image.dtype} {image.shape}; give uint8 (height, width, 3).")
    _refuse_empty(image.shape[1], image.shape[0], name)
    return Image.fromarray(np.ascontiguousarray(image))


def _open_upright(image: str | os.PathLike[str] | Image.Image, name: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return _upright_rgb(image, name)
    with _open_image(image) as file:
        return _upright_rgb(file, name)


def _open_image(path: str | os.PathLike[str]) -> ImageFile.ImageFile:
    """Opens an image; its pixels are decoded when they are needed."""
    require_regular(path)
    return Image.open(path, formats=_FORMATS)


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    _refuse_unsupported(image, name)
    return ImageOps.exif_transpose(image).convert("RGB")


def _refuse_unsupported(image: Image.Image, name: str) -> None:
    _refuse_empty(*image.size, name)
    if image.mode in _HIGH_BIT_DEPTH_MODES:
        # Pillow would clip these to 8 bits, which turns nearly all of the image white.
        raise MediaError(f"{name} has pixels in mode {image.mode}. {_SUPPORTED_IMAGES}")


def _refuse_empty(width: int, height: int, name: str) -> None:
    if not (width and height):
        raise MediaError(f"{name} is {width}x{height} pixels, so it is empty.")


def _display_name(image: ImageInput) -> str:
    """Returns the name of an image in messages: its path, if it has one."""
    return "the image" if isinstance(image, (Image.Image, np.ndarray)) else os.fspath(image)
