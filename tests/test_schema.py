"""Stored data of every earlier schema number is upgraded, and of a newer one refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kadr import schema
from kadr.errors import MediaError, RequestError
from kadr.request.request import Request
from kadr.schema import REQUEST, VIDEO_METADATA, Schema, upgrade_video_metadata
from kadr.version import __version__
from tests.doc_tables import DOCS

SCHEMAS = [value for value in vars(schema).values() if isinstance(value, Schema)]
THREE = Schema(
    "note",
    MediaError,
    upgrades=(
        lambda data: {"words": data["text"].split()},
        lambda data: {**data, "count": len(data["words"])},
    ),
)
NEWEST = {"schema": 3, "words": ["a", "b"], "count": 2}


@pytest.mark.parametrize(
    "stored", [{"text": "a b"}, {"schema": 1, "text": "a b"}, {"schema": 2, "words": ["a", "b"]}, NEWEST]
)
def test_every_number_is_upgraded_to_the_newest(stored: dict[str, Any]) -> None:
    before = dict(stored)
    assert THREE.upgrade(stored) == NEWEST
    assert stored == before


def test_newer_number_is_refused_with_file_number_version_and_way_out() -> None:
    message = (
        f"the note in a/b.json has the schema number 4; kadr {__version__} reads numbers up to 3. "
        "A newer kadr wrote it: update kadr."
    )
    for read in (THREE.upgrade, THREE.read_number):
        with pytest.raises(MediaError, match=re.escape(message)):
            read({"schema": 4}, Path("a/b.json"))


@pytest.mark.parametrize("number", [0, -1, 1.5, "2", True, None, [1]])
def test_number_that_is_none_is_refused(number: Any) -> None:
    with pytest.raises(MediaError, match=re.escape(f"the note has the schema number {number!r}; it must be")):
        THREE.upgrade({"schema": number})


@pytest.mark.parametrize("of", SCHEMAS, ids=lambda of: of.kind)
def test_what_kadr_writes_is_of_the_newest_number(of: Schema) -> None:
    stamped = of.stamp({"name": "x"})
    assert of.read_number(stamped) == of.number
    assert of.upgrade(stamped) == stamped
    with pytest.raises(of.error, match=f"the {of.kind} has the schema number {of.number + 1};"):
        of.upgrade({of.key: of.number + 1})


def test_request_carries_its_number_wherever_it_is_stored() -> None:
    stored = Request(prompt="a red circle", seed=3).to_json()
    assert stored["schema"] == REQUEST.number
    unnumbered = {"schema": 1, "request": {"prompt": "a red circle", "seed": 3}}
    upgraded = upgrade_video_metadata(unnumbered, Path("a.mp4"))
    assert (upgraded["schema"], upgraded["request"]["schema"]) == (VIDEO_METADATA.number, REQUEST.number)
    assert Request.from_json(upgraded["request"]) == Request.from_json(stored)
    with pytest.raises(RequestError, match=f"the request has the schema number {REQUEST.number + 1};"):
        Request.from_json({**stored, "schema": REQUEST.number + 1})


def test_page_lists_every_number() -> None:
    page = (DOCS / "reference" / "stored-files.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    numbers = {row[0]: row[2] for row in rows[1:]}
    expected = {of.kind: str(of.number) for of in SCHEMAS}
    expected |= {"prompt cache": str(schema.PROMPT_CACHE_NUMBER), "example cache": str(schema.EXAMPLE_CACHE_NUMBER)}
    expected |= {"calibration": str(schema.CALIBRATION_NUMBER), "preview cache": str(schema.PREVIEW_CACHE_NUMBER)}
    expected["jobs database"] = str(schema.JOBS_DATABASE_NUMBER)
    assert numbers == expected
