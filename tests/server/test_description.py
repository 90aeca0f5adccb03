"""The page about the API has every route, field, error code and event."""

from __future__ import annotations

import re

import pytest

from kadr.jobs import events, job, worker
from kadr.server.inputs import form_reader, uploads
from kadr.server.inputs.frame_reader import DECODE_SECONDS
from kadr.server.inputs.media_check import MediaLimits
from kadr.server.routes.events import HEARTBEAT_SECONDS
from kadr.server.schema import MAX_ITEMS, MAX_PROMPT_CHARACTERS
from kadr.server.stream_count import MAX_STREAMS
from tests import doc_tables, write_api
from tests.page_commands import ROOT, section_of

SERVER = ROOT / "src" / "kadr" / "server"


@pytest.fixture(scope="module")
def page() -> str:
    return write_api.PAGE.read_text("utf-8")


@pytest.mark.parametrize("name", write_api.TABLES)
def test_tables_of_the_page_are_those_of_the_description(page: str, name: str) -> None:
    """To update the tables: python -m tests.write_api."""
    assert doc_tables.read_table(page, name) == write_api.TABLES[name]()


def test_every_field_has_a_meaning() -> None:
    fields = [line for name in write_api.TABLES for line in write_api.TABLES[name]().splitlines() if "|  |" in line]
    assert {line.split(" | ")[0] for line in fields} <= {"| `object`"}


def test_every_error_code_is_on_the_page(page: str) -> None:
    errors = section_of(page, "Errors")
    source = "\n".join(path.read_text("utf-8") for path in SERVER.rglob("*.py"))
    codes = {*re.findall(r'\bcode="(\w+)"', source), "not_found", "method_not_allowed"}
    codes |= {code for _, code in worker._ERROR_CODES}
    codes |= {job.CANCELLED, job.WORKER_LOST, job.SERVER_LOST, job.DATABASE_LOST, job.STORAGE, job.DISK_FULL}
    codes -= {"gone"}  # nobody reads that answer
    assert sorted(code for code in codes if f"`{code}`" not in errors) == []
    named = set(re.findall(r"`([a-z]+_[a-z_]+|cancelled|internal|failed|storage|stopping|conflict)`", errors))
    assert sorted(named - codes - {"preview_url"}) == []


def test_every_event_is_on_the_page(page: str) -> None:
    kinds = set(re.findall(r"^\| `(\w+)` \|", section_of(page, "Events"), re.MULTILINE))
    assert kinds == {"ready", "reset", *events.EVENT_KINDS} - {events.CLOSED}


def test_limits_of_the_page_are_those_of_the_code(page: str) -> None:
    limits, media, upload = section_of(page, "Limits"), MediaLimits(), uploads.UploadLimits()
    for limit in (
        f"{MAX_PROMPT_CHARACTERS:,} characters",
        f"{MAX_ITEMS} each",
        f"{upload.max_bytes >> 20} MiB, or `--max-upload-mb`",
        f"{media.max_pixels / 1e6:.0f} million pixels",
        f"sides of {media.max_side} pixels, {media.max_frames:,} frames",
        f"{DECODE_SECONDS:.0f} seconds to decode it",
        f"{upload.max_count}, of {upload.max_client_bytes >> 30} GiB",
        f"{form_reader.MAX_FIELDS} fields, {form_reader.MAX_FIELDS_BYTES >> 20} MiB of text",
        f"{form_reader.MAX_FILES} files",
        f"| {MAX_STREAMS} |",
        f"{job.QueueLimits().max_queued} videos",
    ):
        assert limit in limits
    assert f"every {HEARTBEAT_SECONDS:.0f} seconds" in page
