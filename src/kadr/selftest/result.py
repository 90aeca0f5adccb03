"""Results of a self-test: figures with their limits, a verdict for each stage, one report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PASS, FAIL, NOT_RUN = "pass", "fail", "not run"


class NotRun(Exception):
    """Raised by a stage that has nothing to test; the message is the reason."""


@dataclass(frozen=True)
class Check:
    """One figure and its limits. A figure that is not finite fails.

    Args:
        name: what the figure is.
        figure: a number without a unit, or with the unit in the name.
        lower, upper: limits, both inclusive; None for none.
        detail: where the worst case is, such as the name of a tensor.
    """

    name: str
    figure: float
    lower: float | None = None
    upper: float | None = None
    detail: str = ""

    @property
    def passed(self) -> bool:
        """True if the figure is finite and within its limits."""
        lower, upper = (self.lower, -math.inf)[self.lower is None], (self.upper, math.inf)[self.upper is None]
        return math.isfinite(self.figure) and lower <= self.figure <= upper  # type: ignore[operator]

    def describe(self) -> str:
        """Returns one line: figure, limits and detail."""
        limits = {
            (True, True): f"{_format(self.lower)} to {_format(self.upper)}",
            (True, False): f"at least {_format(self.lower)}",
            (False, True): f"at most {_format(self.upper)}",
            (False, False): "for information",
        }[self.lower is not None, self.upper is not None]
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.name} {_format(self.figure)} ({limits}){detail}"

    def to_json(self) -> dict[str, Any]:
        """Returns the check as plain data; a figure that is not finite is null."""
        figure = self.figure if math.isfinite(self.figure) else None
        return {
            "name": self.name,
            "figure": figure,
            "lower": self.lower,
            "upper": self.upper,
            "passed": self.passed,
            "detail": self.detail,
        }


def at_most(name: str, figure: float, upper: float, detail: str = "") -> Check:
    """Returns a check with an upper limit."""
    return Check(name, figure, None, upper, detail)


def at_least(name: str, figure: float, lower: float, detail: str = "") -> Check:
    """Returns a check with a lower limit."""
    return Check(name, figure, lower, None, detail)


def none_of(name: str, faulty: list[str]) -> Check:
    """Returns a check that counts what is faulty; its detail names the first of them."""
    listed = ", ".join(faulty[:3]) + (f" and {len(faulty) - 3} more" if len(faulty) > 3 else "")
    return Check(name, len(faulty), None, 0, listed)


@dataclass(frozen=True)
class StageResult:
    """The outcome of one stage.

    Args:
        checks: in the order they were made.
        problem: the error that ended the stage, or the reason why it was not run; "" for neither.
        was_run: False if there was nothing to test.
    """

    name: str
    checks: tuple[Check, ...]
    seconds: float
    problem: str = ""
    was_run: bool = True

    @property
    def verdict(self) -> str:
        """One of `PASS`, `FAIL` and `NOT_RUN`."""
        if not self.was_run:
            return NOT_RUN
        return FAIL if self.problem or not all(check.passed for check in self.checks) else PASS

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain data."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "seconds": round(self.seconds, 3),
            "problem": self.problem,
            "checks": [check.to_json() for check in self.checks],
        }


@dataclass(frozen=True)
class SelftestReport:
    """All results of a self-test, and what was tested on which machine.

    Args:
        model: name or file name of the model.
        identity: component -> its files, each with its bytes and sha256; no folders.
        settings: device, dtype, weight format and placement of the model.
        machine: versions, processor and device; see `bench.machine.describe_machine`.
    """

    model: str
    identity: Mapping[str, list[dict[str, Any]]]
    settings: Mapping[str, str]
    machine: Mapping[str, Any]
    stages: tuple[StageResult, ...]

    @property
    def passed(self) -> bool:
        """True if no stage failed."""
        return all(stage.verdict != FAIL for stage in self.stages)

    @property
    def failed_stages(self) -> tuple[str, ...]:
        """Names of the stages that failed."""
        return tuple(stage.name for stage in self.stages if stage.verdict == FAIL)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain data."""
        return {
            "model": self.model,
            "verdict": PASS if self.passed else FAIL,
            "files": dict(self.identity),
            "settings": dict(self.settings),
            "machine": dict(self.machine),
            "stages": [stage.to_json() for stage in self.stages],
        }


def _format(figure: float | None) -> str:
    return "none" if figure is None else f"{figure:.4g}"
