"""Names for users of the library come from `kadr`, with signatures that change on purpose only."""

from __future__ import annotations

import typing

import kadr
from kadr import errors
from tests.contracts.public_signatures import SIGNATURES_FILE, signatures


def test_public_signatures_are_those_on_record() -> None:
    """A wanted change: run `python -m tests.contracts.public_signatures`, and say so in CHANGELOG.md."""
    assert signatures() == SIGNATURES_FILE.read_text("utf-8")


def test_every_error_is_exported() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined <= set(kadr.__all__)


def test_types_in_public_signatures_of_the_engine_are_exported() -> None:
    """Whoever calls a method can name what it takes and returns."""
    named = set()
    for method in (kadr.Engine.resolve, kadr.Engine.plan, kadr.Engine.generate, kadr.Engine.write, kadr.Engine.dry_run):
        hints = typing.get_type_hints(method)
        named |= {hints["return"], *typing.get_args(hints["request"])}
    assert {kind.__name__ for kind in named} <= set(kadr.__all__)
