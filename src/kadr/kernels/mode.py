"""Process-wide choice between the fast kernels and their definitions in plain torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from kadr.errors import RequestError

ENVIRONMENT_VARIABLE = "KADR_KERNELS"
AUTO, REFERENCE, EVERYWHERE = "auto", "reference", "everywhere"
MODES = {
    AUTO: "fast kernels where the device has them",
    REFERENCE: "the definitions in plain torch, always",
    EVERYWHERE: "fast kernels on every device: for tests, where an interpreter stands in for a GPU",
}

_current_mode: str | None = None  # None until it is first read


def current() -> str:
    """Returns the current mode, one of `MODES`: the environment's, read once, or that of an enclosing `override`.

    Raises:
        RequestError: the environment variable is not one of `MODES`.
    """
    global _current_mode
    if _current_mode is None:
        _current_mode = _check(os.environ.get(ENVIRONMENT_VARIABLE, AUTO), ENVIRONMENT_VARIABLE)
    return _current_mode


@contextmanager
def override(name: str) -> Iterator[None]:
    """Sets the mode for the duration of the block, in all threads.

    Raises:
        RequestError: `name` is not one of `MODES`.
    """
    global _current_mode
    previous, _current_mode = _current_mode, _check(name, "the kernel mode")
    try:
        yield
    finally:
        _current_mode = previous


def _check(name: str, source: str) -> str:
    if name not in MODES:
        raise RequestError(f"{source} is {name!r}; it must be one of {', '.join(MODES)}.")
    return name
