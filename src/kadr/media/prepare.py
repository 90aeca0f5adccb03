"""Prepares a conditioning image: crop, blur, compress, pad.

The model was trained on frames of compressed videos, so a crisp photograph makes it stand still. The official package
therefore blurs every conditioning image and passes it through H.264 first; without this, image-to-video barely moves.
Every number here follows `load_image_to_tensor_with_resize_and_crop`, `calculate_padding` and `crf_compressor` of the
official package ltx_video 0.1.2, operation by operation: the truncation before H.264 turns a last-bit difference into a
whole grey level.

All of this is done at the photograph's own resolution, so pixels stay bytes as long as they can: only strips of rows
are blurred in float32, and the result is written into the one array of floats that is resized.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from kadr.errors import MediaError
from kadr.media.encoders.formats import CODECS
from kadr.media.image import ImageInput, Notify, crop_box, display_name, load_image
from kadr.media.pyav import check_pyav
from kadr.shapes import Size
from kadr.validation import is_whole_number

DEFAULT_IMAGE_CRF = 29
STRIP_PIXELS = 1 << 18  # that are blurred at a time


def prepare_image(
    image: ImageInput,
    size: Size,
    crf: int = DEFAULT_IMAGE_CRF,
    sampled_size: Size | None = None,
    *,
    resize: bool = False,
    notify: Notify | None = None,
) -> torch.Tensor:
    """Prepares an image for the VAE encoder.

    Args:
        image: a path, a Pillow image, or uint8 (H, W, 3) RGB.
        size: the requested size, before snapping to 32: the image is cropped to its aspect.
        crf: H.264 quality of the compression, 1 (best) to 51; 0 leaves it out.
        sampled_size: the size of the pass that uses the image, if it is not `size.snap()`, as in two passes.
        resize: resize the image to `size` before it is blurred and compressed, as frames of an input video are;
            conditions are compressed at their own resolution.
        notify: see `load_image`.

    Returns:
        float32 (1, 3, 1, H, W) in [-1, 1] at `sampled_size`; the padding is 0, a middle grey.

    Raises:
        MediaError: the image is missing, damaged, of an unsupported format or too small; or `crf` is out of range.

    Source: ltx_video/inference.py. As in the official code, the padding is computed in output pixels but added
    before the image is resized. kadr keeps this bug; it has no effect if width and height are multiples of 32.
    """
    sampled_size = sampled_size or size.snap()
    _check_crf(crf)
    padded = _normalized(_cropped_pixels(image, size, resize=resize, notify=notify), crf, size)
    if padded.shape[-2:] != (sampled_size.height, sampled_size.width):
        padded = F.interpolate(
            padded, size=(sampled_size.height, sampled_size.width), mode="bilinear", align_corners=False
        )
    return padded.unsqueeze(2)


def _cropped_pixels(image: ImageInput, size: Size, *, resize: bool, notify: Notify | None) -> np.ndarray:
    """Returns the largest centred part with the aspect of `size`, uint8 (H, W, 3)."""
    loaded = load_image(image, notify)
    left, top, right, bottom = crop_box(*loaded.size, size, name=display_name(image))
    if resize:
        return np.array(loaded.crop((left, top, right, bottom)).resize((size.width, size.height)))
    pixels = np.empty((bottom - top, right - left, 3), np.uint8)
    for rows in _strips(*pixels.shape[:2]):
        pixels[rows] = np.asarray(loaded.crop((left, top + rows.start, right, top + rows.stop)))
    return pixels


def _strips(height: int, width: int) -> Iterator[slice]:
    """Yields the rows of an image, `STRIP_PIXELS` at a time."""
    step = max(1, STRIP_PIXELS // width)
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))


def _normalized(pixels: np.ndarray, crf: int, size: Size) -> torch.Tensor:
    """Blurs and compresses an image, and adds the margins of `size`.

    Args:
        pixels: uint8 (H, W, 3); overwritten.

    Returns:
        float32 (1, 3, H, W) in [-1, 1], channels last, as the official package resizes it.
    """
    if crf:
        pixels = compress(blur(pixels), crf)
    left, right, top, bottom = size.padding()
    height, width, _ = pixels.shape
    padded = torch.zeros(1, top + height + bottom, left + width + right, 3)
    inside = padded[0, top : top + height, left : left + width]
    if crf:
        inside.copy_(torch.from_numpy(pixels)).div_(255.0)
    else:
        for rows, blurred in blurred_strips(pixels):
            inside[rows] = blurred
    inside.mul_(255.0).div_(127.5).sub_(1.0)
    return padded.permute(0, 3, 1, 2)


def blur(pixels: np.ndarray) -> np.ndarray:
    """Blurs uint8 (H, W, 3) in place, truncated to whole levels as the official package does before H.264."""
    for rows, blurred in blurred_strips(pixels):
        pixels[rows] = (blurred * 255.0).to(torch.uint8).numpy()
    return pixels


def blurred_strips(pixels: np.ndarray) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blurs with a 3x3 Gaussian of standard deviation 1 (.27407, .45186, .27407), mirrored at the edges.

    Args:
        pixels: uint8 (H, W, 3), both sides at least 2. Rows that were yielded may be overwritten.

    Yields:
        Rows, and what they become: float32 (n, W, 3) in [0, 1].

    Source: torchvision's gaussian_blur(kernel_size=3, sigma=1). One 3x3 kernel, not two passes of 3: the sums differ in
    the last bit, which the truncation before H.264 turns into a whole grey level.
    """
    weights = torch.linspace(-1, 1, 3).square().mul(-0.5).exp()
    weights = weights / weights.sum()
    kernel = (weights[:, None] * weights).expand(3, 1, 3, 3)
    above = pixels[1:2].copy()
    for rows in _strips(*pixels.shape[:2]):
        strip = np.concatenate([above, pixels[rows]])
        below = pixels[rows.stop : rows.stop + 1] if rows.stop < len(pixels) else strip[-2:-1]
        above = strip[-1:].copy()
        image = torch.from_numpy(np.concatenate([strip, below])).permute(2, 0, 1).contiguous().float() / 255
        mirrored = F.pad(image[None], (1, 1, 0, 0), mode="reflect")
        yield rows, F.conv2d(mirrored, kernel, groups=3)[0].permute(1, 2, 0)


def compress(pixels: np.ndarray, crf: int = DEFAULT_IMAGE_CRF) -> np.ndarray:
    """Encodes an image as one frame of H.264, and decodes it again; an odd side loses its last pixel.

    libx264 cuts the image into as many slices as it has threads, so that the result depends a little on the number of
    cores, as that of the official package does.

    Args:
        pixels: uint8 (H, W, 3), as is the result.
        crf: 1 (best) to 51.

    Raises:
        MediaError: the encoder refuses the size.

    Source: ltx_video/pipelines/crf_compressor.py, with its settings and plain colour conversions.
    """
    check_pyav()
    import av

    height, width = (side // 2 * 2 for side in pixels.shape[:2])
    try:
        with av.open(_encode_h264(np.ascontiguousarray(pixels[:height, :width]), crf), "r") as container:
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


def _check_crf(crf: int) -> None:
    max_crf = CODECS["h264"].max_crf
    if not is_whole_number(crf) or not 0 <= crf <= max_crf:
        raise MediaError(f"crf is {crf}; it must lie between 1 (best) and {max_crf}, or be 0 for no compression.")
