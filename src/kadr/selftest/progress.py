"""Lines about the progress of a self-test: written by the command, read by the server. Does not load torch."""

from __future__ import annotations

import re

from kadr.selftest.result import FAIL, NOT_RUN, PASS, StageResult

_PROGRESS_LINE = re.compile(rf"selftest: ([^:]+): ({PASS}|{FAIL}|{NOT_RUN})(?:: (.*))?")


def progress_line(stage: StageResult) -> str:
    """Returns a stage's verdict on one line, with the first check that failed."""
    failed = next((check for check in stage.checks if not check.passed), None)
    reason = stage.problem or (failed.describe() if failed else "")
    return f"selftest: {stage.name}: {stage.verdict}{': ' if reason else ''}{reason}"


def parse_progress_line(line: str) -> dict[str, str] | None:
    """Returns name, verdict and problem of a stage; None for another line."""
    match = _PROGRESS_LINE.fullmatch(line.strip())
    return None if match is None else {"name": match[1], "verdict": match[2], "problem": match[3] or ""}
