"""Keys of rows: equal for the same video, however it is written and wherever the files lie; different otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kadr import Condition, Control, Request
from kadr.batch.row import BatchRow, key_rows
from kadr.sampling.settings import Guidance

REQUEST = Request("a", seed=1, frames=9)


def key(folder: Path, request: Request = REQUEST, repetition: int = 0, **fields: object) -> str:
    row = BatchRow(**{"number": 1, "line": 1, "request": request, "engine": {"model": "demo"}, **fields})  # type: ignore[arg-type]
    return row.with_key(folder, repetition).key


def test_key_of_a_row_is_always_the_same() -> None:
    assert key(Path("/x")) == "13b274ce3c569aa65b0023b84760970a", "a changed key makes every video of every batch again"


def test_place_and_default_values_do_not_count(tmp_path: Path) -> None:
    assert key(tmp_path, number=5, line=9, work=3.0) == key(Path("/elsewhere"))
    assert key(tmp_path, replace(REQUEST, skip_initial=0, guidance_batch=False)) == key(tmp_path)


def test_files_may_move_together(tmp_path: Path) -> None:
    def with_files(folder: Path) -> str:
        media, clip = str(folder / "in" / "a.png"), str(folder.parent / "b.mp4")
        request = replace(REQUEST, conditions=(Condition(media),), controls=(Control(clip),), input_video=clip)
        engine = {"model": str(folder / "m.safetensors"), "loras": ["name", str(folder / "l.safetensors")]}
        merged = {"loras": [[str(folder / "l.safetensors"), 0.5, 0.5]], "upscaler": [str(folder / "u")]}
        return key(folder, request, engine={**engine, "vae": str(folder / "v")}) + key(folder, request, engine=merged)

    assert with_files(tmp_path / "one") == with_files(tmp_path / "two")
    moved_alone = replace(REQUEST, conditions=(Condition(str(tmp_path / "b.png")),))
    assert key(tmp_path, moved_alone) != key(tmp_path / "two", moved_alone)


@pytest.mark.parametrize(
    "fields",
    [
        {"request": replace(REQUEST, seed=2)},
        {"request": replace(REQUEST, guidance=Guidance(apg=0.5))},
        {"request": replace(REQUEST, conditions=(Condition("/a.png"),))},
        {"engine": {"model": "demo", "loras": ["a"]}},
        {"seconds": 1.0},
        {"output": "x.mp4"},
    ],
)
def test_another_video_is_another_row(tmp_path: Path, fields: dict[str, object]) -> None:
    assert key(tmp_path, **fields) != key(tmp_path)  # type: ignore[arg-type]


def test_equal_rows_are_told_apart_by_their_order(tmp_path: Path) -> None:
    rows = [
        BatchRow(number=n, line=n, request=replace(REQUEST, seed=seed), engine={})
        for n, seed in enumerate((1, 2, 1, 1))
    ]
    keyed = key_rows(rows, tmp_path)
    assert len({row.key for row in keyed}) == 4
    assert [row.key for row in keyed][:2] == [row.with_key(tmp_path, 0).key for row in rows[:2]]
    assert key_rows(rows[1:], tmp_path)[1].key == keyed[0].key
