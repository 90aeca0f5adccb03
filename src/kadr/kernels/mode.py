"""Whether operations that are written twice run their fast version."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from kadr.errors import RequestError

VARIABLE = "KADR_KERNELS"
AUTO, REFERENCE, EVERYWHERE = "auto", "reference", "everywhere"
NAMES = {
    AUTO: "the fast version where the device has one",
    REFERENCE: "the plain version, always",
    EVERYWHERE: "the fast version on every device: for tests, where an interpreter stands in for a GPU",
}

_current: str | None = None  # None until somebody asks


def current() -> str:
    """A name of `NAMES`: what the environment says when it is first asked for, or what `using` says inside it.

    Raises:
        RequestError: the environment names no such thing.
    """
    global _current
    if _current is None:
        _current = _checked(os.environ.get(VARIABLE, AUTO), VARIABLE)
    return _current


@contextmanager
def using(name: str) -> Iterator[None]:
    """Choose otherwise for a while, in all threads.

    Raises:
        RequestError: there is no such name.
    """
    global _current
    before, _current = _current, _checked(name, "the choice of kernels")
    try:
        yield
    finally:
        _current = before


def _checked(name: str, where: str) -> str:
    if name not in NAMES:
        raise RequestError(f"{where} is {name!r}; it must be one of {', '.join(NAMES)}.")
    return name
