"""`BodyMemory`: bounds the bytes of all bodies that are in memory at the same time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kadr.server.errors import ApiError

MAX_BYTES, MAX_CLIENT_BYTES = 512 << 20, 256 << 20
RETRY_SECONDS = 5


class BodyMemory:
    """Counts the bytes of bodies that are read into memory, by client. Only the event loop uses it.

    Args:
        max_bytes, max_client_bytes: of all clients, and of one.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, max_client_bytes: int = MAX_CLIENT_BYTES) -> None:
        self._max_bytes, self._max_client_bytes = max_bytes, max_client_bytes
        self._num_bytes: Counter[str] = Counter()

    @contextmanager
    def share(self, client: str) -> Iterator[Callable[[int], None]]:
        """Yields a function that counts the next bytes of one body; they are free again when the block ends.

        The function raises ApiError where there is no room.
        """
        taken = 0

        def count(num_bytes: int) -> None:
            nonlocal taken
            if self._num_bytes[client] + num_bytes > self._max_client_bytes:
                raise _full(429, f"your requests on their way have more than {self._max_client_bytes:,} bytes.")
            if self._num_bytes.total() + num_bytes > self._max_bytes:
                raise _full(503, f"the requests on their way have more than {self._max_bytes:,} bytes.")
            taken += num_bytes
            self._num_bytes[client] += num_bytes

        try:
            yield count
        finally:
            self._num_bytes[client] -= taken
            if not self._num_bytes[client]:
                del self._num_bytes[client]


def _full(status: int, message: str) -> ApiError:
    headers = {"retry-after": str(RETRY_SECONDS), "connection": "close"}
    return ApiError(status, f"{message} Try again, or upload the media.", code="too_many_bytes", headers=headers)
