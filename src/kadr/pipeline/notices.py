"""Notices: what was degraded on the way to a video, and why."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from kadr.errors import KadrWarning


class Notices:
    """The notices of one generation, in the order they were given.

    Args:
        messages: those that were known before it began.
    """

    def __init__(self, messages: Iterable[str] = ()) -> None:
        self._messages = list(messages)

    def add(self, message: str) -> None:
        """Adds a notice, and warns."""
        self._messages.append(message)
        warnings.warn(message, KadrWarning, stacklevel=3)

    @property
    def messages(self) -> tuple[str, ...]:
        """The notices so far."""
        return tuple(self._messages)
