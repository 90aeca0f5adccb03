"""Suites: selections of cases by name. Nothing here loads torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kadr.bench.cases import DECODE, DIT, ENCODE, END_TO_END, PROMPT_TOKENS, TEXT, TEXT_LENGTH, Selection, VideoShape
from kadr.errors import RequestError

DEMO_SUITE, RELEASED = "demo", "released"
_SMALL, _CLIP = VideoShape.parse("512x320x25"), VideoShape.parse("768x512x25")
_VIDEO, _LARGE = VideoShape.parse("768x512x121"), VideoShape.parse("1216x704x121")
# The sizes that people make, of the released models' widths. Few blocks tell the time of many: all blocks are alike.
SUITES: Mapping[str, Sequence[Selection]] = {
    DEMO_SUITE: (Selection(),),
    RELEASED: (
        Selection(models=("2b",), num_layers=2, shapes=(_SMALL, _VIDEO, _LARGE), stages=(DIT,)),
        Selection(models=("13b",), num_layers=1, shapes=(_SMALL, _VIDEO), stages=(DIT,)),
        Selection(models=("2b",), num_layers=2, stages=(TEXT,), prompt_tokens=(PROMPT_TOKENS, TEXT_LENGTH)),
        Selection(models=("2b",), num_layers=2, shapes=(_SMALL, _CLIP), stages=(ENCODE, DECODE)),
        Selection(models=("2b",), shapes=(_SMALL,), stages=(END_TO_END,)),
    ),
}
LIST_FIELDS = ("models", "shapes", "stages", "schedules", "prompt_tokens")
CASE_FIELDS = (*LIST_FIELDS, "num_layers")  # what a suite decides


def select_cases(suites: Sequence[str], flags: Selection) -> list[Selection]:
    """Returns the selections of suites; where none is named, that of the flags alone.

    Args:
        flags: decides variants, rounds, device and the like of every selection.

    Raises:
        RequestError: there is no such suite, or the flags choose cases too.
    """
    if not suites:
        return [flags]
    if unknown := [name for name in suites if name not in SUITES]:
        raise RequestError(f"there is no suite {unknown[0]!r}; known are {', '.join(SUITES)}.")
    default = Selection()
    has_lists = any(list(getattr(flags, name)) != list(getattr(default, name)) for name in LIST_FIELDS)
    if has_lists or flags.num_layers is not None:
        raise RequestError("a suite has its own models, sizes, stages and layers; leave --suite or those flags out.")
    chosen = [selection for name in suites for selection in SUITES[name]]
    return [replace(flags, **{name: getattr(each, name) for name in CASE_FIELDS}) for each in chosen]
