"""Names of videos: people can read them, nothing that is there has them, and none leads out of the folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kadr import Request
from kadr.batch.output_names import OutputNames, check_output_name, prompt_words
from kadr.batch.row import BatchRow
from kadr.errors import RequestError


def row(number: int, prompt: str = "a red circle", output: str | None = None) -> BatchRow:
    return BatchRow(number=number, line=number, request=Request(prompt), engine={}, output=output)


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("A red circle, moving right!", "a-red-circle-moving-right"),
        ("a red circle moving right on a black background", "a-red-circle-moving-right-on-a-black"),
        ("Лиса бежит по снегу", "лиса-бежит-по-снегу"),
        ("एक लाल वृत्त", "एक-लाल-वृत्त"),
        ("红" * 100, "红" * 40),
        ("x" * 200, "x" * 40),
        ("cafe\u0301", "caf\u00e9"),
        ("../../etc/passwd\0\n\u202e", "etc-passwd"),
        ("🎬 ...", ""),
        ("", ""),
    ],
)
def test_first_words_of_a_prompt_make_a_name(prompt: str, words: str) -> None:
    assert prompt_words(prompt) == words
    assert len(words.encode()) < 200


def test_names_have_numbers_of_one_width(tmp_path: Path) -> None:
    assert OutputNames(tmp_path, (), 50).take(row(7)) == "007-a-red-circle.mp4"
    assert OutputNames(tmp_path, (), 10_000).take(row(7, "!")) == "00007.mp4"


def test_no_name_is_given_twice(tmp_path: Path) -> None:
    (tmp_path / "001-A-RED-CIRCLE.mp4").touch()
    names = OutputNames(tmp_path, ["001-a-red-circle-2.mp4", "gone.mp4"], 3)
    assert names.take(row(1)) == "001-a-red-circle-3.mp4"
    assert names.take(row(1)) == "001-a-red-circle-4.mp4"
    assert names.take(row(2, output="mine.mp4")) == "mine.mp4"
    for output in ("Mine.mp4", "gone.mp4", "001-a-red-circle.mp4"):
        with pytest.raises(RequestError, match="a name that another row or file of the folder has"):
            names.take(row(3, output=output))


@pytest.mark.parametrize("name, full", [("clip", "clip.mp4"), ("clip.MP4", "clip.MP4"), ("лиса 1", "лиса 1.mp4")])
def test_plain_names_are_taken(name: str, full: str) -> None:
    assert check_output_name(name) == full


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "../x", "/x.mp4", "a/b.mp4", "a\\b", "C:x", ".", "..", ".kadr", ".hidden.mp4", os.sep),
        *("x.mov", "x\n", "\ud800", "a\0b", "x" * 250, "é" * 125, 5, None, ["x"]),
    ],
)
def test_other_names_are_refused(value: object) -> None:
    with pytest.raises(RequestError, match="output is "):
        check_output_name(value)


@pytest.mark.skipif(sys.platform != "win32", reason="only Windows has names of devices")
def test_names_of_devices_are_refused() -> None:
    with pytest.raises(RequestError, match="does not allow"):
        check_output_name("nul")
