"""Findings of a diagnosis, as plain data, and the collection of those that a piece of work gives."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from kadr.errors import Cancelled, CheckpointError, KadrError, KadrWarning, MediaError, PlanError, RequestError

ERROR, QUALITY, SPEED, NOTE = "error", "quality", "speed", "note"
KINDS = (ERROR, QUALITY, SPEED, NOTE)  # the worst first
_TOPIC_BY_ERROR = {
    PlanError: "memory",
    MediaError: "images and clips",
    CheckpointError: "model",
    RequestError: "request",
}
# Kinds of what is warned of, by topic; other topics cost quality. Warnings without a topic are about names and files.
_KIND_BY_TOPIC = {"time": SPEED, "device": SPEED, "clip": NOTE, "windows": NOTE, "": NOTE}


@dataclass(frozen=True)
class Finding:
    """Something that makes the result bad, or slow, or that is worth knowing.

    Args:
        kind: "error" (nothing can be made), "quality" (it looks worse than it could), "speed" or "note".
        topic: what it is about, in a word or two, such as "guidance".
        message: says what it is and why that matters, in a sentence or two.
        fix: flags or a command that correct it, for pasting; "" where the message says all there is.
    """

    kind: str
    topic: str
    message: str
    fix: str = ""

    @property
    def is_bad(self) -> bool:
        """True if it makes the result bad; what is slow or only worth knowing does not."""
        return self.kind in (ERROR, QUALITY)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return asdict(self)


class Findings:
    """The findings so far, each once."""

    def __init__(self) -> None:
        self._findings: dict[Finding, None] = {}

    def add(self, findings: Iterable[Finding]) -> None:
        """Adds findings, of which some may be known already."""
        self._findings.update(dict.fromkeys(findings))

    @contextmanager
    def record(self) -> Iterator[None]:
        """Adds what the block warns of, and the error that ends it, which goes no further.

        Like `warnings.catch_warnings`, it takes the warnings of all threads meanwhile.
        """
        caught: list[warnings.WarningMessage] = []
        errors: list[Finding] = []
        with warnings.catch_warnings(record=True) as log:
            warnings.simplefilter("always", KadrWarning)
            try:
                yield
            except Cancelled:
                raise
            except KadrError as error:
                errors.append(_from_error(error))
            caught += log
        self.add(_from_warning(item.message) for item in caught if isinstance(item.message, KadrWarning))
        self.add(errors)

    def sorted(self) -> tuple[Finding, ...]:
        """Returns the findings, the worst first, else in the order they were added."""
        return tuple(sorted(self._findings, key=lambda finding: KINDS.index(finding.kind)))


def _from_warning(warning: KadrWarning) -> Finding:
    kind = _KIND_BY_TOPIC.get(warning.topic, QUALITY)
    return Finding(kind, warning.topic or "files", str(warning), warning.fix)


def _from_error(error: KadrError) -> Finding:
    by_class = next((topic for kind, topic in _TOPIC_BY_ERROR.items() if isinstance(error, kind)), "error")
    return Finding(ERROR, error.topic or by_class, str(error), error.fix)
