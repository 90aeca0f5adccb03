"""Numbers from a user: a bool is none, and neither is NaN or infinity, wherever a number is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kadr import Request, Windows
from kadr.errors import MediaError, RequestError
from kadr.media.encoders.formats import Encoding
from kadr.media.prepare import prepare_image
from kadr.media.writer import VideoWriter
from kadr.request.inputs import Condition, Control
from kadr.sampling.settings import Guidance, Pass
from kadr.sampling.step_cache import StepCache
from kadr.shapes import Size, snap_frames
from kadr.spec.lora import Lora, check_lora_strength
from kadr.text.enhance import Enhancer
from kadr.training.settings import TrainingSettings
from kadr.validation import check_range, is_number, is_whole_number

NAN, INFINITY = float("nan"), float("inf")
REQUEST = partial(Request, prompt="a red circle")
TRAINING = partial(TrainingSettings, size=Size(64, 64), frames=9)
# Builds something from one number; the words are those of the message.
NUMBERS: dict[str, tuple[Callable[[Any], object], str]] = {
    "fps": (lambda value: REQUEST(fps=value), "between 0.1 and 240"),
    "guidance": (lambda value: REQUEST(guidance=value), "between 1 and 100; 1 is off"),
    "tone_map": (lambda value: REQUEST(tone_map=value), "between 0 and 1"),
    "image_noise": (lambda value: REQUEST(image_noise=value), "between 0 and 10"),
    "decode_timestep": (lambda value: REQUEST(decode_timestep=value), "between 0 and 1"),
    "sigmas": (lambda value: REQUEST(sigmas=(1.0, value)), "list of numbers"),
    "sigmas of a pass": (lambda value: Pass(sigmas=(value,)), "list of numbers"),
    "sigmas of guidance": (lambda value: Guidance(sigmas=(value,)), "list of numbers"),
    "stg_scale": (lambda value: Guidance(stg_scale=value), "between 0 and 100; 0 is off"),
    "rescale": (lambda value: Guidance(rescale=[value]), "between 0 and 1"),
    "apg": (lambda value: Guidance(apg=value), "between -1 and 1"),
    "apg_norm": (lambda value: Guidance(apg_norm=value), "between 0 and inf"),
    "threshold": (lambda value: StepCache("first-block", threshold=value), "between 0 and 1"),
    "adain": (lambda value: Windows(adain=value), "adain of windows is .* between 0 and 1"),
    "overlap_strength": (lambda value: Windows(overlap_strength=value), "between 0 and 1"),
    "anchor_strength": (lambda value: Windows(anchor_strength=value), "between 0 and 1"),
    "strength": (lambda value: Condition("photo.png", strength=value), "between 0 and 1"),
    "LoRA strength": (check_lora_strength, "between -10 and 10; 1 is as it was trained"),
    "learning_rate": (lambda value: TRAINING(learning_rate=value), "learning_rate is .* between"),
    "timeout": (lambda value: Enhancer("http://localhost:1/v1", timeout=value), "above 0 and at most 3600 s"),
}
WHOLE_NUMBERS: dict[str, tuple[Callable[[Any], object], str]] = {
    "width": (lambda value: Size(value, 64), "between 1 and 8192 pixels"),
    "frames": (snap_frames, "between 1 and 36001"),
    "seed": (lambda value: REQUEST(seed=value), "seed is .*; it must be a whole number"),
    "steps": (lambda value: REQUEST(steps=value), "between 1 and 1000"),
    "steps of a pass": (lambda value: Pass(steps=value), "between 1 and 1000"),
    "skip_blocks": (lambda value: Guidance(skip_blocks=[value]), "list of whole numbers"),
    "interval": (lambda value: StepCache("taylor", interval=value), "between 1 and 16"),
    "frames of a window": (lambda value: Windows(frames=value), "a window has .*; it must be a whole number"),
    "overlap": (lambda value: Windows(overlap=value), "a whole number of frames"),
    "frame": (lambda value: Condition("photo.png", frame=value), "between -36001 and 36001"),
    "rank": (lambda value: TRAINING(rank=value), "rank is .* between 1 and"),
}


@pytest.mark.parametrize("value", [True, NAN, INFINITY, -INFINITY, "1"], ids=repr)
@pytest.mark.parametrize("name", [*NUMBERS, *WHOLE_NUMBERS])
def test_what_is_no_finite_number_is_refused_with_its_limits(name: str, value: Any) -> None:
    build, message = {**NUMBERS, **WHOLE_NUMBERS}[name]
    with pytest.raises(RequestError, match=message) as refusal:
        build(value)
    assert repr(value) in str(refusal.value)


@pytest.mark.parametrize("name", ["guidance", "apg", "threshold", "steps", "width", "LoRA strength"])
def test_a_huge_integer_is_refused_like_any_other_number(name: str) -> None:
    build, message = {**NUMBERS, **WHOLE_NUMBERS}[name]
    with pytest.raises(RequestError, match=message):
        build(10**400)


@pytest.mark.parametrize("value", [True, NAN, 1.5, "1"], ids=repr)
def test_a_crf_is_a_whole_number(value: Any, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=f"crf is {value}.*51"):
        VideoWriter(tmp_path / "out.mp4", Size(32, 32), 24, encoding=Encoding(crf=value))
    with pytest.raises(MediaError, match=f"crf is {value}.*51"):
        prepare_image(np.zeros((8, 8, 3), np.uint8), Size(32, 32), value)


def test_a_bool_is_no_frame_rate(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="fps is True; it must be a number above 0"):
        VideoWriter(tmp_path / "out.mp4", Size(32, 32), True)


def test_both_limits_of_a_range_belong_to_it() -> None:
    for value in (1, 2.0, 3):
        check_range("x", value, 1, 3)
    with pytest.raises(RequestError, match=r"x is 4; it must lie between 1 and 3 apples\."):
        check_range("x", 4, 1, 3, " apples")
    with pytest.raises(RequestError, match=r"x is 2\.0; it must be a whole number between 1 and 3\."):
        check_range("x", 2.0, 1, 3, is_whole=True)
    assert [is_number(value) for value in (1, 1.5, True, NAN, None)] == [True, True, False, False, False]
    assert [is_whole_number(value) for value in (1, 1.5, True, None)] == [True, False, False, False]


@pytest.mark.parametrize("value", [None, 5, "", ["photo.png"]], ids=repr)
def test_value_that_is_not_a_path_is_refused(value: Any) -> None:
    for build in (Condition, Control, Lora, lambda path: REQUEST(input_video=5 if path is None else path)):
        with pytest.raises(RequestError, match="it must be a path"):
            build(value)


@pytest.mark.parametrize("prompt", [None, 5, ["a"], b"a"], ids=repr)
def test_prompt_that_is_not_text_is_refused_with_its_value(prompt: Any) -> None:
    with pytest.raises(RequestError, match=re.escape(f"the prompt is {prompt!r}; it must be text")):
        Request(prompt=prompt)


def test_size_that_is_not_text_is_refused() -> None:
    with pytest.raises(RequestError, match="size is 5; write WIDTHxHEIGHT"):
        Size.parse(5)  # type: ignore[arg-type]
