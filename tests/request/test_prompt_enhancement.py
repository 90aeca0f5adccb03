"""Prompt enhancement of a request: the images an endpoint gets, the resulting request, and failures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kadr import Condition, Enhancer, Request, enhance_prompt
from kadr.errors import EnhanceError, KadrWarning, MediaError, RequestError
from kadr.media.writer import VideoWriter
from kadr.request.prompt_enhancement import MAX_IMAGE_SIDE
from kadr.request.windows import Windows
from kadr.shapes import Size
from tests.fakechat import PARAGRAPH, FakeChat, chat_completion, error_reply, serve_fake_chat

REQUEST = Request(prompt="a red fox", seed=3, frames=9)


@pytest.fixture
def chat() -> Iterator[FakeChat]:
    with serve_fake_chat() as chat:
        yield chat


@pytest.fixture
def clip(tmp_path: Path) -> str:
    """Writes 17 frames of 64x48; frame n has brightness 10n."""
    with VideoWriter(tmp_path / "clip.mp4", Size(64, 48), 24) as writer:
        writer.write(np.stack([np.full((48, 64, 3), 10 * number, np.uint8) for number in range(17)]))
    return str(tmp_path / "clip.mp4")


def decode_data_url(url: str) -> Image.Image:
    kind, _, data = url.partition(",")
    assert kind == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format == "JPEG"
    return image


def test_enhanced_request_keeps_the_users_words(chat: FakeChat) -> None:
    enhanced = enhance_prompt(REQUEST, Enhancer(chat.url))
    assert enhanced == replace(REQUEST, prompt=PARAGRAPH, original_prompt="a red fox")
    assert Request.from_json(enhanced.to_json()) == enhanced


def test_request_enhanced_twice_keeps_the_users_words(chat: FakeChat) -> None:
    once = enhance_prompt(REQUEST, Enhancer(chat.url))
    chat.reply = chat_completion("Another paragraph about the fox.")
    twice = enhance_prompt(once, Enhancer(chat.url))
    assert (twice.prompt, twice.original_prompt) == ("Another paragraph about the fox.", "a red fox")


def test_prompts_of_windows_are_enhanced_one_by_one(chat: FakeChat) -> None:
    chat.reply = lambda request: chat_completion(
        f"Scene {len(chat.requests)}: fox | number {len(chat.requests)} walks | on."
    )
    enhanced = enhance_prompt(replace(REQUEST, prompt=" a fox|a hare |  an owl", windows=Windows()), Enhancer(chat.url))
    assert enhanced.prompt == "fox number 1 walks on. | fox number 2 walks on. | fox number 3 walks on."
    assert enhanced.original_prompt == " a fox|a hare |  an owl"
    assert [chat_request.text.rpartition("\n")[2] for chat_request in chat.requests] == ["a fox", "a hare", "an owl"]


def test_failure_keeps_the_request_with_a_warning(chat: FakeChat) -> None:
    chat.reply = error_reply(500, "out of memory")
    with pytest.warns(KadrWarning, match=r"out of memory\)\. The prompt is used as it was written\."):
        assert enhance_prompt(REQUEST, Enhancer(chat.url)) is REQUEST


def test_separator_splits_no_prompt_without_windows(chat: FakeChat) -> None:
    enhanced = enhance_prompt(replace(REQUEST, prompt="a fox | a hare"), Enhancer(chat.url))
    assert (enhanced.prompt, len(chat.requests)) == (PARAGRAPH, 1)


def test_failure_of_one_prompt_keeps_all_prompts(chat: FakeChat) -> None:
    chat.reply = lambda request: chat_completion(PARAGRAPH if len(chat.requests) == 1 else "")
    request = replace(REQUEST, prompt="a fox | a hare", windows=Windows())
    with pytest.warns(KadrWarning, match="answered with nothing"):
        assert enhance_prompt(request, Enhancer(chat.url)) is request


def test_failure_of_a_required_enhancement_is_an_error(chat: FakeChat) -> None:
    chat.reply = error_reply(500, "out of memory")
    with pytest.raises(EnhanceError, match="out of memory"):
        enhance_prompt(REQUEST, Enhancer(chat.url, required=True))


def test_endpoint_gets_small_images_with_their_positions(chat: FakeChat, tmp_path: Path) -> None:
    Image.new("RGBA", (2000, 1000), (250, 10, 10, 255)).save(tmp_path / "large.png")
    Image.new("RGB", (60, 90), (10, 10, 250)).save(tmp_path / "small.png")
    large, small = str(tmp_path / "large.png"), str(tmp_path / "small.png")
    conditions = (
        Condition(large),
        Condition(small, frame=-1),
        Condition(small, frame=40),
        Condition(small, frame=-9),
        Condition(small, box=(32, 0, 64, 96)),
    )
    enhance_prompt(replace(REQUEST, conditions=conditions), Enhancer(chat.url))
    (chat_request,) = chat.requests
    images = [decode_data_url(url) for url in chat_request.images]
    assert [image.size for image in images] == [(MAX_IMAGE_SIDE, MAX_IMAGE_SIDE // 2), *[(60, 90)] * 4]
    assert images[0].getpixel((9, 9)) == pytest.approx((250, 10, 10), abs=6)
    assert images[1].getpixel((9, 9)) == pytest.approx((10, 10, 250), abs=6)
    assert [part["text"] for part in chat_request.content_parts[:-1] if part["type"] == "text"] == [
        "Picture 1 is the first frame of the video:",
        "Picture 2 is the last frame of the video:",
        "Picture 3 is frame 40 of the video:",
        "Picture 4 is frame 8 before the last of the video:",
        "Picture 5 is the first frame of the video, but only its part of 64x96 pixels, 32 from the left and 0 from the "
        "top:",
    ]


def test_endpoint_gets_the_first_frame_of_a_clips_range(chat: FakeChat, clip: str) -> None:
    conditions = (
        Condition(clip),
        Condition(clip, frame=16, frame_range=(8, None)),
        Condition(clip, frame=-1, frame_range=(-5, None)),
        Condition(clip, frame=-9, frame_range=(12, 13)),
    )
    enhance_prompt(replace(REQUEST, conditions=conditions, input_video=clip), Enhancer(chat.url))
    (chat_request,) = chat.requests
    brightness = [np.asarray(decode_data_url(url)).mean() for url in chat_request.images]
    assert brightness == pytest.approx([0, 0, 80, 120, 120], abs=4)
    descriptions = [part["text"] for part in chat_request.content_parts[:-1] if part["type"] == "text"]
    assert descriptions == [
        "Picture 1 is the first frame of the video that this one is made from:",
        "Picture 2 is the first frame of a clip that the video begins with:",
        "Picture 3 is the first frame of a clip that the video shows from frame 16 on:",
        "Picture 4 is the first frame of a clip that the video ends with:",
        "Picture 5 is the first frame of a clip that the video shows near its end:",
    ]


@pytest.mark.parametrize("name", ["gone.png", "odd.png"])
def test_unreadable_image_is_refused_before_any_chat_request(chat: FakeChat, tmp_path: Path, name: str) -> None:
    (tmp_path / "odd.png").write_bytes(b"not an image")
    with pytest.raises(MediaError, match=name):
        enhance_prompt(replace(REQUEST, conditions=(Condition(str(tmp_path / name)),)), Enhancer(chat.url))
    assert chat.requests == []


def test_empty_frame_range_is_refused_before_any_chat_request(chat: FakeChat, clip: str) -> None:
    with pytest.raises(RequestError, match="has 17 frames"):
        enhance_prompt(replace(REQUEST, conditions=(Condition(clip, frame_range=(20, 25)),)), Enhancer(chat.url))
    assert chat.requests == []
