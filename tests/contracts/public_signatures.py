"""Writes the signatures of everything that `kadr` exports: `python -m tests.contracts.public_signatures`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import kadr

SIGNATURES_FILE = Path(__file__).with_name("public_signatures.txt")


def signatures() -> str:
    """Returns one line for each export, and for each public method and property of an exported class."""
    lines = (line for name in kadr.__all__ for line in _describe(name, getattr(kadr, name)))
    return "".join(re.sub(r"<function (\w+) at 0x\w+>", r"\1", line) + "\n" for line in lines)


def _describe(name: str, export: Any) -> Iterator[str]:
    if not inspect.isclass(export):
        yield f"{name}{inspect.signature(export)}" if callable(export) else name
        return
    bases = ", ".join(base.__name__ for base in export.__mro__[1:-1] if base.__module__.startswith("kadr"))
    is_plain_error = issubclass(export, BaseException) and "__init__" not in vars(export)
    yield f"{name}({bases})" if is_plain_error else f"{name}{_without_return(export)}"
    for member, value in sorted(_public_members(export)):
        if isinstance(value, property):
            yield f"{name}.{member}: {inspect.signature(value.fget).return_annotation}"  # type: ignore[arg-type]
        elif callable(value) or isinstance(value, classmethod | staticmethod):
            yield f"{name}.{member}{inspect.signature(getattr(export, member))}"


def _without_return(export: type) -> str:
    return str(inspect.signature(export)).partition(" -> ")[0]


def _public_members(export: type) -> Iterator[tuple[str, Any]]:
    fields = set(getattr(export, "__dataclass_fields__", ())) if is_dataclass(export) else set()
    seen: set[str] = set()
    for owner in export.__mro__:
        if not owner.__module__.startswith("kadr") or issubclass(owner, Enum):
            continue
        for member, value in vars(owner).items():
            if not member.startswith("_") and member not in fields | seen:
                seen.add(member)
                yield member, value


if __name__ == "__main__":
    SIGNATURES_FILE.write_text(signatures(), "utf-8")
