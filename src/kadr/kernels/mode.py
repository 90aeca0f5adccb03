"""Choice between the fast kernels and their definitions in plain torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from kadr.errors import RequestError
from kadr.quoting import quote

ENVIRONMENT_VARIABLE = "KADR_KERNELS"
ZENTORCH_VARIABLE = "KADR_ZENTORCH"  # "0" leaves zentorch unused where it is installed; see `kernels.cpu.zen`
AUTO, REFERENCE, EVERYWHERE = "auto", "reference", "everywhere"
MODES = {
    AUTO: "fast kernels where the device has them",
    REFERENCE: "the definitions in plain torch, always",
    EVERYWHERE: "fast kernels on every device: for tests, where an interpreter stands in for a GPU",
}

_override: ContextVar[str | None] = ContextVar("kadr kernel mode", default=None)


def current() -> str:
    """Returns the current mode, one of `MODES`: that of an enclosing `override`, else the environment's, read once.

    torch's compiler cannot trace it: ask `torch.compiler.is_compiling` first.

    Raises:
        RequestError: the environment variable is not one of `MODES`.
    """
    return _override.get() or _environment_mode()


@contextmanager
def override(name: str) -> Iterator[None]:
    """Sets the mode for the duration of the block, in this thread (or asyncio task) only.

    Raises:
        RequestError: `name` is not one of `MODES`.
    """
    token = _override.set(_check(name, "the kernel mode"))
    try:
        yield
    finally:
        _override.reset(token)


@cache
def _environment_mode() -> str:
    return _check(os.environ.get(ENVIRONMENT_VARIABLE, AUTO), ENVIRONMENT_VARIABLE)


def _check(name: str, source: str) -> str:
    if name not in MODES:
        raise RequestError(f"{source} is {quote(name)}; it must be one of {', '.join(MODES)}.")
    return name
