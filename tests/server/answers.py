"""Answers of the server, and what must be true of every one of them, whatever was sent."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

MARKER = "Secret Folder (of the operator), v1.0"  # in the path of everything that the server stores or reads
MAY_FAIL_WITH = (503, 507)  # the statuses of 500 and more that are documented


@dataclass(frozen=True)
class Answer:
    """One answer. headers: names in small letters."""

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        """Returns the value of the first header of a name."""
        return next((value for key, value in self.headers if key == name), None)

    @property
    def data(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.data["error"]

    @property
    def code(self) -> str | None:
        return self.error["code"]


def check_answer(answer: Answer, roots: Collection[str] = ()) -> Answer:
    """Returns an answer that is no bug: no 5xx but the documented ones, no path of the server, errors in the envelope.

    Args:
        roots: folders of the server that nothing may name.
    """
    assert answer.status < 500 or answer.status in MAY_FAIL_WITH, answer
    text = answer.body.decode("latin-1") + repr(answer.headers)
    for root in (MARKER, MARKER.replace(" ", "%20"), *roots):
        assert root not in text, answer
    if answer.status >= 400:
        check_envelope(answer)
    return answer


def check_envelope(answer: Answer) -> None:
    """Checks that an answer with an error is as every client reads it."""
    assert answer.header("content-type") == "application/json", answer
    if set(answer.data) == {"alive", "ready", "workers_ready", "workers", "paused", "problem", "version"}:
        return  # the one documented exception: /health with 503
    assert set(answer.data) == {"error"}, answer
    error = answer.error
    assert set(error) == {"message", "type", "param", "code"}, answer
    assert isinstance(error["message"], str), answer
    assert error["message"].isprintable(), answer
    assert len(error["message"]) < 600, answer
    assert error["type"] in (
        *("invalid_request_error", "authentication_error", "permission_error", "not_found_error"),
        *("timeout_error", "conflict_error", "rate_limit_error", "server_error"),
    )
    assert isinstance(error["code"], str), answer
    assert error["param"] is None or (isinstance(error["param"], str) and len(error["param"]) < 200), answer


def refused(answer: Answer, status: int | Collection[int], code: str | Collection[str] | None = None) -> Answer:
    """Returns an answer that refuses, with this status and code."""
    statuses = (status,) if isinstance(status, int) else status
    assert answer.status in statuses, answer
    if code is not None:
        assert answer.code in ((code,) if isinstance(code, str) else code), answer
    return answer
