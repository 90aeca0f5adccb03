"""Finished jobs expire by age and by disk budget; jobs that wait or are in progress never do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kadr.errors import RequestError
from kadr.jobs.claims import JobClaims
from kadr.jobs.expiry import Retention, delete_expired
from kadr.jobs.job import Job, JobError
from kadr.jobs.store import JobStore
from tests.jobs.conftest import Clock
from tests.jobs.jobs_by_hand import new_job, write_video

DAY = 24 * 3600.0


def complete(store: JobStore, prompt: str, num_bytes: int = 1000) -> Job:
    """Submits a job and completes it with a video of so many bytes."""
    claims = JobClaims(store)
    store.submit(new_job(prompt, priority=100))
    claim = claims.claim()
    assert claim is not None
    assert claim.job.request == {"prompt": prompt}
    claims.complete(claim, write_video(store.folders, claim, "x" * num_bytes))
    return store.get(claim.job.id)


def remaining(store: JobStore) -> list[str]:
    """Returns the prompts of all jobs, oldest first."""
    return [job.request["prompt"] for job in store.jobs(newest_first=False).jobs]


@pytest.mark.parametrize("retention", [{"max_age": 0}, {"max_bytes": 0}, {"max_bytes": 1.5}, {"max_age": -1}])
def test_retention_out_of_range_is_refused(retention: dict[str, float]) -> None:
    with pytest.raises(RequestError):
        Retention(**retention)  # type: ignore[arg-type]


def test_nothing_expires_by_default(store: JobStore, clock: Clock) -> None:
    job = complete(store, "a")
    clock.now += 10_000 * DAY
    assert delete_expired(store, Retention()) == []
    assert Retention().expires_at(job) is None


def test_old_jobs_expire(store: JobStore, clock: Clock) -> None:
    old = complete(store, "old")
    clock.now += 2 * DAY
    complete(store, "new")
    assert Retention(max_age=DAY).expires_at(old) == (old.finished_at or 0) + DAY
    assert delete_expired(store, Retention(max_age=DAY)) == [old.id]
    assert remaining(store) == ["new"]
    assert not store.folders.path(old.id).exists()


def test_jobs_that_finished_first_expire_where_they_take_too_much(store: JobStore) -> None:
    late = store.submit(new_job("late", priority=-1))
    jobs = [complete(store, name, 10_000) for name in "abc"]
    claim = JobClaims(store).claim()
    assert claim is not None
    assert claim.job.id == late.id
    JobClaims(store).complete(claim, write_video(store.folders, claim, "x" * 10_000))
    assert delete_expired(store, Retention(max_bytes=25_000)) == [jobs[1].id, jobs[0].id]
    assert remaining(store) == ["late", "c"]  # though it was submitted first


def test_failed_jobs_count_with_their_media(store: JobStore) -> None:
    job = store.submit(new_job("upload"), fill=lambda folder: (folder / "clip.mp4").write_bytes(bytes(10_000)))
    claim = JobClaims(store).claim()
    assert claim is not None
    JobClaims(store).fail(claim, JobError("failed", "no"))
    assert delete_expired(store, Retention(max_bytes=5000)) == [job.id]


def test_jobs_that_are_not_finished_never_expire(store: JobStore, clock: Clock) -> None:
    for name in ("in progress", "waiting"):
        store.submit(new_job(name), fill=lambda folder: (folder / "clip.mp4").write_bytes(bytes(10_000)))
    JobClaims(store).claim()
    clock.now += 10_000 * DAY
    assert delete_expired(store, Retention(max_age=1, max_bytes=1)) == []
    assert remaining(store) == ["in progress", "waiting"]


def test_clock_that_was_set_back_only_delays(store: JobStore, clock: Clock) -> None:
    job = complete(store, "a")
    clock.now -= 3600
    assert delete_expired(store, Retention(max_age=DAY)) == []
    clock.now += DAY + 2 * 3600
    assert delete_expired(store, Retention(max_age=DAY)) == [job.id]


def test_job_that_somebody_deletes_meanwhile_is_no_error(
    store: JobStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = complete(store, "a"), complete(store, "b")
    clock.now += 2 * DAY
    delete: Callable[[str], None] = store.delete

    def delete_both(job_id: str) -> None:
        monkeypatch.setattr(store, "delete", delete)
        delete(second.id)
        delete(job_id)

    monkeypatch.setattr(store, "delete", delete_both)
    assert set(delete_expired(store, Retention(max_age=DAY))) == {first.id, second.id}
    assert remaining(store) == []


def test_favourites_never_expire(store: JobStore, clock: Clock) -> None:
    favourite, other = complete(store, "favourite", 10_000), complete(store, "other", 10_000)
    job = store.set_favorite(favourite.id, True)
    assert job.is_favorite
    clock.now += 2 * DAY
    assert Retention(max_age=DAY).expires_at(job) is None
    assert delete_expired(store, Retention(max_age=3 * DAY, max_bytes=15_000)) == []  # nor do they count
    assert delete_expired(store, Retention(max_age=DAY, max_bytes=5000)) == [other.id]
    store.set_favorite(favourite.id, False)
    assert delete_expired(store, Retention(max_age=DAY)) == [favourite.id]
