"""A request whose prompt a chat model writes out; it keeps the user's own words beside it."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace

from PIL import Image

from kadr.errors import EnhanceError, KadrWarning
from kadr.media.clip import read_video
from kadr.media.image import load_image
from kadr.request.inputs import Condition
from kadr.request.request import Request
from kadr.request.resolved_conditions import open_condition_clip
from kadr.request.windows import PROMPT_SEPARATOR
from kadr.text.chat_messages import ChatImage
from kadr.text.enhance import Enhancer

MAX_IMAGE_SIDE = 512  # pixels that an endpoint is shown; vision models see little more, and each costs time
JPEG_QUALITY = 85


def enhance_prompt(request: Request, enhancer: Enhancer) -> Request:
    """The request with its prompt written out by an endpoint, and the user's own words as its `original_prompt`.

    The prompt of each window of a long video is written out by itself. The endpoint is shown the request's pictures,
    and the first frames of its clips. What comes is part of the request: to make the video again takes no endpoint.

    Returns:
        The same request, with a warning, where the endpoint fails and is not `required`.

    Raises:
        EnhanceError: the endpoint fails, and is `required`.
        MediaError, RequestError: a picture or clip cannot be read, or has no such part.
    """
    scenes = list(request.prompts)
    pictures = condition_images(request)
    try:
        made = enhancer.enhance_scenes(scenes, pictures)
    except EnhanceError as error:
        if enhancer.required:
            raise
        warnings.warn(f"{error} The prompt is used as it was written.", KadrWarning, stacklevel=2)
        return request
    prompt = f" {PROMPT_SEPARATOR} ".join(made)
    return replace(request, prompt=prompt, original_prompt=request.original_prompt or request.prompt)


def condition_images(request: Request) -> tuple[ChatImage, ...]:
    """The pictures that the video is held to, as an endpoint is shown them: small, with the place of each in words."""
    pictures = [
        ChatImage(_encode_jpeg(_first_image(condition)), _describe_position(condition))
        for condition in request.conditions
    ]
    if request.input_video is not None:
        first = Image.fromarray(read_video(request.input_video, max_frames=1).frames[0])
        pictures.insert(0, ChatImage(_encode_jpeg(first), "the first frame of the video that this one is made from"))
    return tuple(pictures)


def _first_image(condition: Condition) -> Image.Image:
    """Of a clip the first of the frames that are taken."""
    if condition.is_clip:
        return Image.fromarray(next(iter(open_condition_clip(condition))))
    return load_image(condition.media)


def _describe_position(condition: Condition) -> str:
    """Where it stands, in words; how many frames the video has may be for the model's recipe to say."""
    at, box = condition.frame, condition.box
    if condition.is_clip:
        ways = {0: "begins with", -1: "ends with"}
        among = ways.get(at, f"shows from frame {at} on" if at > 0 else "shows near its end")
        place = f"the first frame of a clip that the video {among}"
    elif at in (0, -1):
        place = f"the {'last' if at else 'first'} frame of the video"
    else:
        place = f"frame {at} of the video" if at > 0 else f"frame {-1 - at} before the last of the video"
    if box is None:
        return place
    x, y, width, height = box
    return f"{place}, but only its part of {width}x{height} pixels, {x} from the left and {y} from the top"


def _encode_jpeg(image: Image.Image) -> bytes:
    image = image.copy()
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
