"""Events are numbered, the newest are kept, and a subscriber that fails harms nobody."""

from __future__ import annotations

import pytest

from kadr.jobs.events import JOB, NOTICE, Event, EventLog


def event(seq: int, owner: str | None = "ann") -> Event:
    return Event(seq, JOB, f"job {seq}", owner)


def test_events_after_a_number_are_returned() -> None:
    log = EventLog()
    for seq in (3, 5, 9):
        log.publish(event(seq))
    assert [item.seq for item in log.since(3) or ()] == [5, 9]
    assert log.since(9) == []
    assert [item.seq for item in log.since(0) or ()] == [3, 5, 9]


def test_gap_that_is_too_old_is_not_filled() -> None:
    log = EventLog(max_events=2)
    for seq in (1, 2, 3, 4):
        log.publish(event(seq))
    assert log.since(1) is None
    assert [item.seq for item in log.since(2) or ()] == [3, 4]


def test_subscriber_gets_events_until_it_unsubscribes() -> None:
    log, seen = EventLog(), []
    unsubscribe = log.subscribe(seen.append)
    log.publish(event(1))
    unsubscribe()
    unsubscribe()  # twice does no harm
    log.publish(event(2))
    assert [item.seq for item in seen] == [1]


def test_subscriber_that_raises_is_dropped_and_logged() -> None:
    lines, seen = [], []
    log = EventLog(log=lines.append)

    def fail(item: Event) -> None:
        raise RuntimeError("the loop is closed")

    log.subscribe(fail)
    log.subscribe(seen.append)
    for seq in (1, 2):
        log.publish(event(seq))
    assert [item.seq for item in seen] == [1, 2]
    assert lines == ["a subscriber of events ended with RuntimeError: the loop is closed"]


@pytest.mark.parametrize(
    ("owner", "viewer", "is_visible"),
    [("ann", "ann", True), ("ann", "bob", False), ("ann", None, True), (None, "bob", True), ("", "bob", False)],
)
def test_events_of_others_are_not_visible(owner: str | None, viewer: str | None, is_visible: bool) -> None:
    assert event(1, owner).is_visible_to(viewer) is is_visible
    assert Event(1, NOTICE, None, None).is_visible_to(viewer)


def test_each_log_has_an_id_of_its_own() -> None:
    assert EventLog().boot_id != EventLog().boot_id
