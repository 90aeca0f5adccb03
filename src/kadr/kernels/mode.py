"""Whether operations that are written twice run their fast version."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from kadr.errors import RequestError

ENVIRONMENT_VARIABLE = "KADR_KERNELS"
AUTO, REFERENCE, EVERYWHERE = "auto", "reference", "everywhere"
MODES = {
    AUTO: "the fast version where the device has one",
    REFERENCE: "the plain version, always",
    EVERYWHERE: "the fast version on every device: for tests, where an interpreter stands in for a GPU",
}

_current_mode: str | None = None  # None until somebody asks


def current() -> str:
    """A name of `MODES`: what the environment says when it is first asked for, or what `override` says inside it.

    Raises:
        RequestError: the environment names no such thing.
    """
    global _current_mode
    if _current_mode is None:
        _current_mode = _check(os.environ.get(ENVIRONMENT_VARIABLE, AUTO), ENVIRONMENT_VARIABLE)
    return _current_mode


@contextmanager
def override(name: str) -> Iterator[None]:
    """Choose otherwise for a while, in all threads.

    Raises:
        RequestError: there is no such name.
    """
    global _current_mode
    before, _current_mode = _current_mode, _check(name, "the choice of kernels")
    try:
        yield
    finally:
        _current_mode = before


def _check(name: str, source: str) -> str:
    if name not in MODES:
        raise RequestError(f"{source} is {name!r}; it must be one of {', '.join(MODES)}.")
    return name
