"""Hostile input of every kind: explained in one line, with exit code 1 or 2, in bounded time and memory.

`make test` draws the same examples each time. `make fuzz` draws ten times as many new ones, 200 of them through the
real command; a failure prints a `@reproduce_failure` line, which replays it when it is put above the test.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import cases
from tests.fuzz.command import Case, Outcome, run_command, run_in_process

SCALE = int(os.environ.get("KADR_FUZZ", "0"))  # 0: the examples of `make test`
EXAMPLES = {
    "checkpoint": 35,
    "gguf": 60,
    "lora": 30,
    "video": 50,
    "image": 10,
    "clip": 30,
    "config": 40,
    "prompt": 8,
    "series": 30,
    "batch": 60,
    "path": 113,
    "number": 130,
    "environment": 4,
}
REAL_EXAMPLES = 20 * SCALE or 2


def fuzz(examples: int) -> settings:
    """Settings of a test of so many examples, ten times as many in `make fuzz`."""
    return settings(
        max_examples=examples,
        derandomize=not SCALE,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def require_manners(case: Case, outcome: Outcome) -> None:
    complaints = list(outcome.complaints())
    assert not complaints, f"{'; '.join(complaints)}: {case!r}\n{outcome.err[-2000:]}"


def test_kinds_have_examples_500_in_all() -> None:
    assert EXAMPLES.keys() == cases.ALL.keys()
    assert sum(EXAMPLES.values()) >= 500


@pytest.mark.parametrize("kind", cases.ALL)
def test_hostile_input_is_explained_in_one_line(kind: str) -> None:
    @fuzz(EXAMPLES[kind] * max(1, SCALE))
    @given(cases.ALL[kind])
    def check(case: Case) -> None:
        require_manners(case, run_in_process(case))

    check()


def test_hostile_input_is_explained_by_the_real_command() -> None:
    @fuzz(REAL_EXAMPLES)
    @given(st.one_of(*cases.ALL.values()))
    def check(case: Case) -> None:
        require_manners(case, run_command(case))

    check()


@pytest.mark.parametrize(
    ("outcome", "complaint"),
    [
        (Outcome(3, "", "error: x\n", 0, 0, ()), "exit code"),
        (Outcome(1, "", "", 0, 0, ()), "0 error lines"),
        (Outcome(1, "", "error: a\nerror: b\n", 0, 0, ()), "2 error lines"),
        (Outcome(0, "\x1b[2J\n", "", 0, 0, ()), "control codes"),
        (Outcome(1, "", f"error: {'x' * 500}\n", 0, 0, ()), "characters"),
        (Outcome(1, "", "error: unexpected\nThis is a bug.\n", 0, 0, ()), "unexpected"),
        (Outcome(0, "", "", 11, 0, ()), "seconds"),
        (Outcome(0, "", "", 0, 2 * 10**9, ()), "bytes"),
        (Outcome(1, "", "error: x\n", 0, 0, ("out.mp4",)), "files left"),
    ],
)
def test_every_lack_of_manners_is_noticed(outcome: Outcome, complaint: str) -> None:
    assert any(complaint in line for line in outcome.complaints())
