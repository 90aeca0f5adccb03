"""The fields of a row over the defaults of all: which wins, what contradicts, and what is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kadr import Condition, Control, Request
from kadr.batch.build_row import RowDefaults, build_row, read_rows
from kadr.batch.row import BatchRow
from kadr.batch.table_file import TableRow
from kadr.errors import RequestError
from kadr.sampling.settings import Guidance
from kadr.shapes import Size
from kadr.spec.lora import Lora


def build(folder: Path, defaults: RowDefaults | None = None, **fields: Any) -> BatchRow:
    """Builds the row of these fields."""
    return build_row(TableRow(1, 1, {"prompt": "a", **fields}), defaults or RowDefaults(), folder)


def test_fields_of_a_request_are_fields_of_a_row(tmp_path: Path) -> None:
    request = Request(
        "b", size=(64, 64), frames=9, seed=-3, sigmas=(1.0, 0.5), guidance=Guidance(apg=0.5), tone_map=0.5, image_crf=0
    )
    row = build(tmp_path, **json.loads(json.dumps(request.to_json())))
    assert (row.request, row.engine, row.seconds, row.output) == (request, {"model": "demo"}, None, None)


def test_row_comes_before_the_defaults(tmp_path: Path) -> None:
    defaults = RowDefaults(request=Request("", size=(64, 64), steps=4, seed=7, negative_prompt="blurry"))
    row = build(tmp_path, defaults, seed=8, size="96x64")
    assert row.request == Request("a", size=(96, 64), steps=4, seed=8, negative_prompt="blurry")
    assert build(tmp_path, defaults, sigmas=[1.0, 0.5]).request.steps is None
    sigmas = RowDefaults(request=Request("", sigmas=(1.0, 0.5)))
    assert build(tmp_path, sigmas, steps=3).request == Request("a", steps=3)


def test_length_is_in_frames_or_seconds(tmp_path: Path) -> None:
    frames, seconds = RowDefaults(request=Request("", frames=9)), RowDefaults(seconds=2.5)
    assert (build(tmp_path, seconds).seconds, build(tmp_path, seconds, frames=17).seconds) == (2.5, None)
    row = build(tmp_path, frames, seconds=1)
    assert (row.seconds, row.request.frames) == (1.0, None)
    assert build(tmp_path, width=96, height=64).request.size == Size(96, 64)


def test_media_are_relative_to_the_file(tmp_path: Path) -> None:
    outside = str(tmp_path.parent / "x.png")
    row = build(
        tmp_path,
        RowDefaults(request=Request("", conditions=(Condition("/default.png"),))),
        conditions=[{"media": outside, "frame": 8}],
        image=["sub/a.png", {"media": "b.png", "frame": -1, "strength": 0.5}],
        video="clip",
        control={"media": "c.mp4", "kind": "canny", "frame_range": [0, 9]},
        input_video="~no such user/d.mp4",
    )
    assert row.request.conditions == (
        Condition(outside, frame=8),
        Condition(str(tmp_path / "sub" / "a.png")),
        Condition(str(tmp_path / "b.png"), frame=-1, strength=0.5),
        Condition(str(tmp_path / "clip"), is_clip=True),
    )
    assert row.request.controls == (Control(str(tmp_path / "c.mp4"), kind="canny", frame_range=(0, 9)),)
    assert row.request.input_video == str(tmp_path / "~no such user" / "d.mp4")


def test_loras_are_files_beside_the_rows_or_names(tmp_path: Path) -> None:
    (tmp_path / "s.safetensors").touch()
    own = str(tmp_path / "s.safetensors")
    for lora in ("s.safetensors", ["s.safetensors", 1], {"path": "s.safetensors"}):
        row = build(tmp_path, lora=lora)
        assert (row.engine["loras"], row.request.lora_strengths) == ([own], ((1.0, 1.0),))
    row = build(tmp_path, loras=[["s.safetensors", 0.5, 0.25], "demo-lora-teal"])
    assert (row.engine["loras"], row.request.lora_strengths) == ([own, "demo-lora-teal"], ((0.5, 0.25), (1.0, 1.0)))
    defaults = RowDefaults(engine={"model": "demo", "merge_loras": True}, loras=[Lora("style", 0.5)])
    assert build(tmp_path, defaults).engine["loras"] == [["style", 0.5, 0.5]]
    assert "loras" not in build(tmp_path, defaults, loras=[]).engine


def test_model_of_a_row_has_nothing_that_suits_another(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").touch()
    engine = {"model": "x", "release": "r", "vae": "v", "text_encoder": "t5", "second_model": "y"}
    row = build(tmp_path, RowDefaults(engine=engine, has_recipe=True), model="m.safetensors")
    assert row.engine == {"model": str(tmp_path / "m.safetensors"), "text_encoder": "t5", "recipe": None}
    assert build(tmp_path, RowDefaults(engine=engine), model="demo").engine["model"] == "demo"
    assert build(tmp_path, RowDefaults(engine=engine)).engine == engine


def test_request_of_an_earlier_kadr_is_a_row(tmp_path: Path) -> None:
    row = build(tmp_path, schema=1, stochastic=True)
    assert row.request == Request("a", sampler="euler_stochastic")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"step": 4}, "there is no field 'step'. Did you mean steps?"),
        ({"Promt": "b"}, "there is no field 'Promt'. Did you mean prompt?"),
        ({"num_frames": 9}, "there is no field 'num_frames'. Did you mean frames?"),
        ({"xyzzy\x1b[2J": 1}, r"there is no field 'xyzzy\x1b[2J'. docs/guides/batch.md lists"),
        ({"seed": "7"}, "seed is '7'; it must be a whole number"),
        ({"frames": 9.0}, "frames"),
        ({"frames": 9, "seconds": 1}, "give frames or seconds, not both"),
        ({"seconds": "1"}, "seconds is '1'; it must be a number above 0"),
        ({"seconds": 0}, "seconds is 0; it must be a number above 0"),
        ({"width": 64}, "give size, or width with height"),
        ({"width": 64, "height": 64, "size": "64x64"}, "give size, or width with height"),
        ({"width": [1], "height": {}}, "[1]x{}"),
        ({"size": [64, 64]}, "size is [64, 64]; write WIDTHxHEIGHT"),
        ({"image": 5}, "image is 5; it must be a path, an object"),
        ({"image": [{"frame": 5}]}, "image is [{'frame': 5}]; it must be a path, an object"),
        ({"image": {"media": "a.png", "frames": 1}}, "one of the conditions has frames, unknown"),
        ({"image": "a\0b"}, "no path has a NUL character"),
        ({"control": {"media": "a.mp4", "kind": "edges"}}, "the kind of control is 'edges'"),
        ({"lora": "a", "loras": ["b"]}, "give lora or loras, not both"),
        ({"loras": "a"}, "loras is 'a'; it must be a list"),
        ({"lora": {"file": "a"}}, "a LoRA has file, unknown"),
        ({"lora": ["a", "strong"]}, "the strength of a LoRA is 'strong'"),
        ({"model": 5}, "model is 5; it must be a name"),
        ({"model": ""}, "model is ''; it must be a name"),
        ({"model": "\ud800"}, "half a character"),
        ({"prompt": "a\0b"}, r"prompt is 'a\x00b'; text has no NUL"),
        ({"negative_prompt": "\ud800"}, r"negative_prompt is '\ud800'; text has no NUL and no half"),
        ({"prompt": 5}, "the prompt is 5; it must be text"),
        ({"schema": 999}, "the request has the schema number 999"),
        ({"output": "../a.mp4"}, "output is '../a.mp4'; it must be a plain name"),
        ({"windows": [1]}, "windows is [1]"),
        ({"second_pass": 3}, "second_pass is 3"),
    ],
)
def test_bad_field_is_refused_by_name(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        build(tmp_path, **fields)


def test_row_without_a_prompt_and_one_with_a_problem_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="it has no prompt"):
        build_row(TableRow(1, 1, {"seed": 1}), RowDefaults(), tmp_path)
    with pytest.raises(RequestError, match="the line is not JSON: x"):
        build_row(TableRow(1, 1, {}, "the line is not JSON: x"), RowDefaults(), tmp_path)


def test_every_row_of_a_file_is_good_or_has_a_reason(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "output": "x"},
        {"prompt": "b", "sed": 1},
        {"prompt": "c", "output": "X.mp4"},
        {"prompt": "d"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n[]")
    rows, invalid = read_rows(tmp_path / "a.jsonl", RowDefaults())
    assert [(row.number, row.line, row.output) for row in rows] == [(1, 1, "x.mp4"), (4, 4, None)]
    assert [(each.number, each.line, each.status) for each in invalid] == [
        (number, number, "failed") for number in (2, 3, 5)
    ]
    messages = [each.error.message for each in invalid if each.error]
    assert messages[:2] == [
        "there is no field 'sed'. Did you mean seed?",
        "output is 'X.mp4', as in line 1. Choose another.",
    ]
