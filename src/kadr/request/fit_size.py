"""The size that fits an image or clip: `size="auto"`, and the warning where a crop loses much of one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import replace

from kadr.errors import KadrWarning, RequestError
from kadr.media.clip import probe_upright_size
from kadr.media.image import probe_image
from kadr.request.inputs import Condition, Control
from kadr.request.pass_media import PassControl, PassFrames
from kadr.request.request import AUTO_SIZE, Request
from kadr.request.resolved_media import ResolvedMedia
from kadr.shapes import MAX_SIDE, SPATIAL_COMPRESSION, Size

MAX_SILENT_LOSS = 0.1  # of an image's pixels, which a crop may cut off without a warning
MIN_SIDE = 2 * SPATIAL_COMPRESSION  # the first of two passes still has a latent each way
AREA_WEIGHT = 0.5  # a share of unused pixels counts half as much as a share of the image that is cut off


def with_fitting_size(request: Request, recipe_size: Size) -> Request:
    """Returns the request with the size that fits its media, if it is "auto".

    Args:
        recipe_size: of the model; its number of pixels is the most that the video has.

    Raises:
        RequestError: there is no image or clip.
        MediaError: it cannot be read.
    """
    if request.size != AUTO_SIZE:
        return request
    width, height = _first_media_size(request)
    return replace(request, size=fitting_size(width, height, recipe_size.width * recipe_size.height))


def _first_media_size(request: Request) -> tuple[int, int]:
    """Returns the upright width and height of the input video, else of the first condition, else of the first control.

    An image with a box covers a part of the video only, so it does not decide.
    """
    if request.input_video is not None:
        return probe_upright_size(request.input_video)
    whole_conditions = [condition for condition in request.conditions if condition.box is None]
    media: list[Condition | Control] = [*whole_conditions, *request.controls]
    if not media:
        raise RequestError(
            f'the size is "{AUTO_SIZE}", but there is no image or clip that covers the video. Give one with --image, '
            "--video, --input-video or --control, or a size such as 704x480."
        )
    path, is_clip = media[0].media, media[0].is_clip
    return probe_upright_size(path) if is_clip else probe_image(path)


def fitting_size(width: int, height: int, max_pixels: int) -> Size:
    """Returns the size with sides of multiples of 32 that keeps most of an image and uses most of `max_pixels`."""
    aspect, best, best_cost = width / height, Size(MIN_SIDE, MIN_SIDE), math.inf
    for size in _sizes_within(aspect, max_pixels):
        ratio = size.width / size.height / aspect
        cost = 1 - min(ratio, 1 / ratio) + AREA_WEIGHT * (1 - size.width * size.height / max_pixels)
        if cost < best_cost:
            best, best_cost = size, cost
    return best


def _sizes_within(aspect: float, max_pixels: int) -> Iterable[Size]:
    """Yields, for each height, the widths next to the aspect that leave at most `max_pixels`."""
    for rows in range(MIN_SIDE // SPATIAL_COMPRESSION, MAX_SIDE // SPATIAL_COMPRESSION + 1):
        height = rows * SPATIAL_COMPRESSION
        columns = min(height * aspect, max_pixels / height) / SPATIAL_COMPRESSION
        for rounded in (math.floor(columns), math.ceil(columns)):
            width = max(rounded * SPATIAL_COMPRESSION, MIN_SIDE)
            if width <= MAX_SIDE and width * height <= max_pixels:
                yield Size(width, height)


def warn_crops(uses: Iterable[PassFrames | PassControl], size: Size) -> None:
    """Warns, once for each file, where a crop cuts off more than a tenth of an image or clip.

    Args:
        size: of the video. A use of another size covers a box, which no size of the video would make fit.
    """
    warned: set[str] = set()
    for use in uses:
        loss, (width, height) = _crop_loss(use.media, use.size)
        if loss <= MAX_SILENT_LOSS or use.media.path in warned:
            continue
        warned.add(use.media.path)
        fitting = fitting_size(width, height, size.width * size.height)
        fitting_loss = _loss(width, height, fitting)
        is_better = use.size == size and fitting_loss < loss - 0.02
        remedy = f" --size {fitting} would cut off {fitting_loss:.0%}." if is_better else ""
        message = (
            f"{use.media.path} is {width}x{height} pixels: cropped to the aspect of {use.size}, it loses {loss:.0%} of "
            f"them.{remedy}"
        )
        fix = f"--size {fitting}" if is_better else ""
        warnings.warn(KadrWarning(message, topic="images and clips", fix=fix), stacklevel=2)


def _crop_loss(media: ResolvedMedia, size: Size) -> tuple[float, tuple[int, int]]:
    """Returns the share of pixels that a crop cuts off, and the upright size. Of a clip, only a frame tells that."""
    width, height = media.width, media.height
    losses = _loss(width, height, size), _loss(height, width, size)
    if media.is_clip and max(losses) > MAX_SILENT_LOSS and losses[0] != losses[1]:
        width, height = probe_upright_size(media.path)
    return _loss(width, height, size), (width, height)


def _loss(width: int, height: int, size: Size) -> float:
    ratio = (width / height) / (size.width / size.height)
    return 1 - min(ratio, 1 / ratio)
