"""Jobs as they are submitted: values out of range are refused, ids are safe as names of folders."""

from __future__ import annotations

import pytest

from kadr.errors import RequestError
from kadr.jobs.job import JobError, QueueLimits, canonical_json, is_job_id, is_utf8, new_job_id
from tests.jobs.jobs_by_hand import new_job


@pytest.mark.parametrize("priority", [101, -101, 1.5, "1", True, None])
def test_priority_out_of_range_is_refused(priority: object) -> None:
    with pytest.raises(RequestError, match="priority is"):
        new_job(priority=priority)


@pytest.mark.parametrize("owner", [None, 3, "half \ud800 a character"])
def test_owner_that_cannot_be_stored_is_refused(owner: object) -> None:
    with pytest.raises(RequestError, match="the owner of a job is"):
        new_job(owner=owner)


@pytest.mark.parametrize(
    "limits", [{"max_queued": 0}, {"max_queued_per_owner": 0}, {"max_passes": -1}, {"max_queued": 1.5}]
)
def test_limits_out_of_range_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(RequestError):
        QueueLimits(**limits)


def test_ids_differ_and_have_the_form_of_ids() -> None:
    ids = {new_job_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(is_job_id(job_id) for job_id in ids)


@pytest.mark.parametrize(
    "text",
    ["", "video_", "video_" + "g" * 32, "video_" + "a" * 31, "video_" + "A" * 32, "../../etc/passwd", "a" * 38]
    + ["video_" + "a" * 32 + "\n", "video_video_" + "a" * 26],
)
def test_other_texts_are_no_ids(text: str) -> None:
    assert not is_job_id(text)


def test_message_of_an_error_is_one_escaped_line() -> None:
    assert JobError("failed", "a\nb\x1b[2J").message == "a b\\x1b[2J"
    assert len(JobError("failed", "x" * 10_000).message) <= 480


def test_equal_data_has_equal_json() -> None:
    assert canonical_json({"b": 1, "a": {"d": 2, "c": 3}}) == canonical_json({"a": {"c": 3, "d": 2}, "b": 1})


def test_half_a_character_cannot_be_stored() -> None:
    assert is_utf8("kadr, кадр, 🎬")
    assert not is_utf8("\udc80")
