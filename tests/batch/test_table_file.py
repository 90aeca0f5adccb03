"""The three formats of a batch's file, well formed and hostile: a bad row is one row, a bad file is refused by name."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kadr.batch import table_file
from kadr.batch.table_file import MAX_ROW_BYTES, TableRow, read_table
from kadr.errors import RequestError

BOM = b"\xef\xbb\xbf"


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fields_of(path: Path) -> list[dict[str, Any]]:
    """Returns the fields of rows that are all good."""
    rows = read_table(path)
    assert [row.problem for row in rows] == [""] * len(rows)
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    return [dict(row.fields) for row in rows]


def problems_of(path: Path) -> list[tuple[int, str]]:
    """Returns the line and the problem of each row."""
    return [(row.line, row.problem) for row in read_table(path)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_text_has_a_prompt_per_line(tmp_path: Path, end: bytes) -> None:
    path = write(tmp_path, "a.TXT", BOM + end.join([b"# shapes", b"", b"  a red circle ", b"a #2 | b", b"   # no"]))
    assert read_table(path) == [TableRow(1, 3, {"prompt": "a red circle"}), TableRow(2, 4, {"prompt": "a #2 | b"})]


def test_object_per_line(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "seed": 3, "frames": None}, {"prompt": "b", "sigmas": [1.0, 0.5], "guidance": {"apg": 1}}]
    path = write(tmp_path, "a.jsonl", BOM + "\n\n".join(map(json.dumps, rows)).encode() + b"\r\n  \n")
    assert fields_of(path) == [{"prompt": "a", "seed": 3}, rows[1]]
    assert [row.line for row in read_table(path)] == [1, 3]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_cells_are_text_for_names_and_json_otherwise(tmp_path: Path, mark: str) -> None:
    header = ["prompt", "seed", "fps", "multi_scale", "image", "sigmas", "model", "size", "output", "cache"]
    cells = ["007", "12", "2.5", "FALSE", "a.png", '"[1.0, 0.5]"', "2", "64x64", "5", "first-block"]
    path = write(tmp_path, "a.csv", BOM + f"{mark.join(header)}\n{mark.join(cells)}\n".encode())
    expected = ["007", 12, 2.5, False, "a.png", [1.0, 0.5], "2", "64x64", "5", "first-block"]
    assert fields_of(path) == [dict(zip(header, expected, strict=True))]


def test_media_of_a_cell_may_be_json(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a.csv",
        'prompt,image,lora\na,"[""a.png"", {""media"": ""b.png"", ""frame"": -1}]","[""s.safetensors"", 0.5]"\n',
    )
    expected = {"image": ["a.png", {"media": "b.png", "frame": -1}], "lora": ["s.safetensors", 0.5]}
    assert fields_of(path) == [{"prompt": "a", **expected}]


def test_quoted_cells_have_commas_quotes_and_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", '\r\n prompt ,seed,\r\n"a ""b"", c\nd",1,\r\n,,\r\n\r\nlast\r\n')
    assert read_table(path) == [
        TableRow(1, 3, {"prompt": 'a "b", c\nd', "seed": 1}),
        TableRow(2, 7, {"prompt": "last"}),
    ]


@pytest.mark.parametrize(
    "line, problem",
    [
        ("a,1,2", "the row has 3 cells, and the header 2"),
        ('"a"b,1', "the row is not CSV"),
        ('a,"[1, 2"', r"seed is '\[1, 2', which is not JSON"),
        (b"\xff,1", "the row is not UTF-8"),
        ('"never ends', "the row is not CSV: unexpected end of data"),
        (b"x" * (MAX_ROW_BYTES + 1), "."),
    ],
)
def test_bad_row_of_cells_is_one_row(tmp_path: Path, line: str | bytes, problem: str) -> None:
    content = line.encode() if isinstance(line, str) else line
    path = write(tmp_path, "a.csv", b"prompt,seed\ngood,1\n" + content + b"\n")
    (first, good), (second, bad) = problems_of(path)
    assert (first, good, second) == (2, "", 3)
    assert re.match(problem, bad)


def test_rows_after_a_bad_one_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'prompt,seed\n"a"b,1\nc,2\n')
    assert [dict(row.fields) for row in read_table(path)] == [{}, {"prompt": "c", "seed": 2}]


@pytest.mark.parametrize(
    "line, problem",
    [
        (b"[1]", "it must be an object of fields"),
        (b'"a"', "it must be an object of fields"),
        (b'{"prompt": "a"', "the line is not JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "it has 'prompt' twice"),
        (b'{"prompt": "a", "guidance": {"apg": 1, "apg": 2}}', "it has 'apg' twice"),
        (b'{"prompt": ' + b"[" * 100_000, "the line is not JSON"),
        (b'{"prompt": "\xff"}', "the line is not UTF-8"),
        (b'{"prompt": "a\0b"}', "the line is not JSON"),
        (b'{"prompt": "' + b"x" * MAX_ROW_BYTES + b'"}', "the row has 1,000,014 bytes; it may have 1,000,000"),
        (b'{"seed": 1' + b"0" * 5000 + b"}", "the line is not JSON" if sys.version_info >= (3, 11) else ""),
    ],
)
def test_bad_object_is_one_row(tmp_path: Path, line: bytes, problem: str) -> None:
    path = write(tmp_path, "a.jsonl", b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    (_, first), (number, bad), (_, last) = problems_of(path)
    assert (first, number, last) == ("", 2, "")
    assert problem in bad


@pytest.mark.parametrize(
    "line, problem",
    [
        (b"\xff\xfe", "the line is not UTF-8"),
        (b"a\0b", "the line has a NUL character"),
        (b"x" * 1_000_001, "the row has"),
    ],
)
def test_bad_prompt_is_one_row(tmp_path: Path, line: bytes, problem: str) -> None:
    path = write(tmp_path, "a.txt", b"a\n" + line + b"\nb")
    (_, first), (number, bad), (_, last) = problems_of(path)
    assert (first, number, last) == ("", 2, "")
    assert bad.startswith(problem)


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.csv",
            "prompt,step\na,1\n",
            r"line 1 of .*a\.csv, the header: there is no field 'step'. Did you mean steps\?",
        ),
        ("a.csv", "\n\nprompt,prompt\na,b\n", r"line 3 .*the header has prompt twice"),
        ("a.csv", 'prompt,"se', "line 1 .*the row is not CSV"),
        ("a.csv", "prompt\n".encode("utf-16"), "line 1 .*it is not UTF-8"),
        ("a.csv", "prompt,seed\n\n,,\n", "has no rows"),
        ("a.csv", b"", "has no rows"),
        ("a.txt", "# only this\n", "has no rows"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.json", "{}", r"ends in '\.json'; a batch is a \.jsonl"),
        ("a", "a", "ends in ''"),
    ],
)
def test_bad_file_is_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_table(write(tmp_path, name, content))


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b.txt").mkdir()
    for name in ("a.txt", "b.txt"):
        with pytest.raises(RequestError, match="cannot be read: "):
            read_table(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.csv")
    (tmp_path / "a.txt").symlink_to("/dev/zero")
    for name, kind in (("a.csv", "a named pipe"), ("a.txt", "a device")):
        with pytest.raises(RequestError, match=f"it is {kind}, and only regular files are read"):
            read_table(tmp_path / name)


def test_file_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_file, "MAX_FILE_BYTES", 1 << 20)
    with pytest.raises(RequestError, match="has more than 1 MB"):
        read_table(write(tmp_path, "a.txt", b"a" * ((1 << 20) + 1)))


def test_ten_thousand_rows_are_read_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, began = 10_000, time.monotonic()
    for name, lines in (
        ("a.txt", [f"prompt {number}" for number in range(count)]),
        ("a.csv", ["prompt,seed", *(f'"prompt, {number}",{number}' for number in range(count))]),
        ("a.jsonl", [json.dumps({"prompt": "a", "seed": number}) for number in range(count)]),
    ):
        assert len(fields_of(write(tmp_path, name, "\n".join(lines)))) == count
    assert time.monotonic() - began < 10
    monkeypatch.setattr(table_file, "MAX_ROWS", count - 1)
    with pytest.raises(RequestError, match="has more than 9,999 rows"):
        read_table(tmp_path / "a.jsonl")
