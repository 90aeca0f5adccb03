"""`EventLog`: the newest events of a queue, numbered, for clients that follow them and come back after a gap."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

JOB, PROGRESS, PREVIEW, NOTICE, DELETED = "job", "progress", "preview", "notice", "deleted"
QUEUE = "queue"  # it was paused or resumed, or a problem keeps jobs from beginning, or no longer does
CLOSED = "closed"  # the queue stops: nothing follows
EVENT_KINDS = (JOB, PROGRESS, PREVIEW, NOTICE, DELETED, QUEUE, CLOSED)
DEFAULT_MAX_EVENTS = 4096


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Args:
        seq: number, rising over all events of a queue.
        kind: one of `EVENT_KINDS`.
        job_id: the job it is about; None: about the queue.
        owner: who may see it; None: everyone.
        data: plain data, or the `Job` of a "job" event.
        is_outcome: of a "job" event: the job finished with it.
    """

    seq: int
    kind: str
    job_id: str | None
    owner: str | None
    data: Any = field(default_factory=dict)
    is_outcome: bool = False

    def is_visible_to(self, owner: str | None) -> bool:
        """Tells whether an owner may see it; None sees everything."""
        return owner is None or self.owner is None or self.owner == owner


Subscriber = Callable[[Event], object]


class EventLog:
    """Keeps the newest events and calls subscribers with each. Threads may share it.

    Args:
        log: takes lines for the operator.

    Attributes:
        boot_id: differs for each process: numbers of another one mean nothing here.
    """

    def __init__(
        self, max_events: int = DEFAULT_MAX_EVENTS, *, log: Callable[[str], object] = lambda line: None
    ) -> None:
        self._log = log
        self.boot_id = secrets.token_hex(4)
        self._events: deque[Event] = deque(maxlen=max_events)
        self._subscribers: list[Subscriber] = []
        self._lock = Lock()

    def publish(self, event: Event) -> None:
        """Adds an event and calls each subscriber with it, which must return at once.

        A subscriber that raises is called no more, and logged: whoever caused the event has nothing to do with it.
        """
        with self._lock:
            self._events.append(event)
            subscribers = tuple(self._subscribers)
        for subscriber in subscribers:
            try:
                subscriber(event)
            except Exception as error:
                self._unsubscribe(subscriber)
                self._log(f"a subscriber of events ended with {type(error).__name__}: {error}")

    def close(self) -> None:
        """Tells every subscriber that nothing follows."""
        with self._lock:
            last_seq = self._events[-1].seq if self._events else 0
        self.publish(Event(last_seq + 1, CLOSED, None, None))

    def since(self, seq: int) -> list[Event] | None:
        """Returns the events after a number, or None where some of them are no longer here."""
        with self._lock:
            if self._events and len(self._events) == self._events.maxlen and seq < self._events[0].seq - 1:
                return None
            return [event for event in self._events if event.seq > seq]

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Calls a function with every later event, from any thread. Returns a function that ends that."""
        with self._lock:
            self._subscribers.append(subscriber)

        return partial(self._unsubscribe, subscriber)

    def _unsubscribe(self, subscriber: Subscriber) -> None:
        with self._lock, suppress(ValueError):  # it may have ended already
            self._subscribers.remove(subscriber)
