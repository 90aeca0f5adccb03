"""Methods that do not keep their object alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def weak_method(method: Callable[P, T]) -> Callable[P, T]:
    """Returns a function that calls a bound method, and does not keep the object of the method alive.

    A module that stores a method of its own is in a reference cycle, and its weights stay in memory until the garbage
    collector runs; with this function it is not.

    Raises:
        ReferenceError: by the function, if the object is gone.
    """
    reference = weakref.WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = reference()
        if bound is None:
            raise ReferenceError("the object of this method is gone")
        return bound(*args, **kwargs)

    return call
