"""`StreamCount`: bounds the streams of events that a client has open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from kadr.server.errors import ApiError

MAX_STREAMS = 100  # of one client
RETRY_SECONDS = 5


class StreamCount:
    """Counts the open streams of each client. Only the event loop uses it."""

    def __init__(self, max_streams: int = MAX_STREAMS) -> None:
        self._max_streams = max_streams
        self._open: Counter[str] = Counter()

    @contextmanager
    def one_more(self, client: str) -> Iterator[None]:
        """Counts one stream while the block runs.

        Raises:
            ApiError: the client has as many as it may.
        """
        if self._open[client] >= self._max_streams:
            raise ApiError(
                429,
                f"you have {self._max_streams} streams of events open, as many as you may. Follow all videos with one.",
                code="too_many_streams",
                headers={"retry-after": str(RETRY_SECONDS)},
            )
        self._open[client] += 1
        try:
            yield
        finally:
            self._open[client] -= 1
