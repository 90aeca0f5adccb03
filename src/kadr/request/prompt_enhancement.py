"""Prompt enhancement of a request: a chat model expands the prompt, and the user's own words are kept beside it."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace

from PIL import Image

from kadr.errors import EnhanceError, KadrWarning
from kadr.media.clip import ClipReader, read_video
from kadr.media.image import load_image
from kadr.request.inputs import Condition
from kadr.request.request import Request
from kadr.request.resolved_media import resolve_condition_clip
from kadr.request.windows import PROMPT_SEPARATOR, split_time
from kadr.text.chat_messages import ChatImage
from kadr.text.enhance import Enhancer

MAX_IMAGE_SIDE = 512  # pixels sent to an endpoint; vision models use little more, and each costs time
JPEG_QUALITY = 85


def enhance_prompt(request: Request, enhancer: Enhancer) -> Request:
    """Returns the request with its prompt expanded by an endpoint, and the user's own words as its `original_prompt`.

    The prompt of each window of a long video is expanded by itself. The endpoint gets the request's images, and the
    first frame of each of its clips. The result is part of the request: a rerun needs no endpoint.

    Returns:
        The same request, with a warning, if the endpoint fails and is not `required`.

    Raises:
        EnhanceError: the endpoint fails, and is `required`.
        MediaError: an image or clip cannot be read.
        RequestError: the frame range of a clip is empty.
    """
    times, scenes = zip(*map(split_time, request.prompts), strict=True)
    images = condition_images(request)
    try:
        enhanced_scenes = enhancer.enhance_scenes(list(scenes), images)
    except EnhanceError as error:
        if enhancer.required:
            raise
        warnings.warn(f"{error} The prompt is used as it was written.", KadrWarning, stacklevel=2)
        return request
    timed = (time + scene for time, scene in zip(times, enhanced_scenes, strict=True))
    prompt = f" {PROMPT_SEPARATOR} ".join(timed)
    original = request.prompt if request.original_prompt is None else request.original_prompt
    return replace(request, prompt=prompt, original_prompt=original)


def condition_images(request: Request) -> tuple[ChatImage, ...]:
    """Returns the images of the request's conditions as an endpoint gets them: small, with a description of each."""
    images = [
        ChatImage(_encode_jpeg(_first_image(condition)), _describe_position(condition))
        for condition in request.conditions
    ]
    if request.input_video is not None:
        first = Image.fromarray(read_video(request.input_video, max_frames=1).frames[0])
        images.insert(0, ChatImage(_encode_jpeg(first), "the first frame of the video that this one is made from"))
    return tuple(images)


def _first_image(condition: Condition) -> Image.Image:
    """Returns a condition's image, or the first frame of the range of its clip."""
    if condition.is_clip:
        first = resolve_condition_clip(condition.media, condition.frame_range).frame_indices[0]
        return Image.fromarray(next(iter(ClipReader.open(condition.media, first + 1).select([first]))))
    return load_image(condition.media)


def _describe_position(condition: Condition) -> str:
    """Returns where a condition is in the video, in words; the number of frames may not be known yet."""
    at, box = condition.frame, condition.box
    if condition.is_clip:
        verbs = {0: "begins with", -1: "ends with"}
        verb = verbs.get(at, f"shows from frame {at} on" if at > 0 else "shows near its end")
        position = f"the first frame of a clip that the video {verb}"
    elif at in (0, -1):
        position = f"the {'last' if at else 'first'} frame of the video"
    else:
        position = f"frame {at} of the video" if at > 0 else f"frame {-1 - at} before the last of the video"
    if box is None:
        return position
    x, y, width, height = box
    return f"{position}, but only its part of {width}x{height} pixels, {x} from the left and {y} from the top"


def _encode_jpeg(image: Image.Image) -> bytes:
    image = image.copy()
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
