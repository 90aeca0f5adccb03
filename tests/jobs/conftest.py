"""A queue in a temporary folder, without workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kadr.jobs.claims import JobClaims
from kadr.jobs.store import JobStore
from kadr.jobs.table import JobChange


class Clock:
    """Seconds since 1970, as a test sets them."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def changes() -> list[JobChange]:
    """Takes what the queues of `open_store` announce."""
    return []


@pytest.fixture
def open_store(tmp_path: Path, clock: Clock, changes: list[JobChange]) -> Iterator[Callable[..., JobStore]]:
    """Opens the queue in a folder, again after it was closed, and closes it at the end."""
    stores: list[JobStore] = []

    def open_store(*args: Any, **kwargs: Any) -> JobStore:
        stores.append(JobStore(tmp_path / "queue", *args, clock=clock, announce=changes.append, **kwargs))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., JobStore]) -> JobStore:
    """A new queue."""
    store = open_store()
    JobClaims(store).recover()
    return store


@pytest.fixture
def claims(store: JobStore) -> JobClaims:
    return JobClaims(store)
