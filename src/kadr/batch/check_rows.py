"""Checks rows against their models before anything is made: by headers, as `Engine.resolve` does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kadr.batch.row import BatchRow
from kadr.cancellation import check_cancelled
from kadr.errors import Cancelled, KadrError, ignore_kadr_warnings
from kadr.jobs.job import canonical_json
from kadr.request.request import refuse_missing_media

if TYPE_CHECKING:
    from kadr.pipeline.engine import Engine
    from kadr.request.resolved_request import ResolvedRequest

OpenEngine = Callable[[Mapping[str, Any]], "Engine"]


@dataclass
class RowChecker:
    """Opens the model of each row, and finds out what it would do.

    Args:
        open_engine: takes what tells a model; see `BatchRow.engine`.

    Attributes:
        refused: number -> reason, of rows that cannot be made.
    """

    open_engine: OpenEngine
    refused: dict[int, KadrError] = field(default_factory=dict)
    _engines: dict[str, Engine | KadrError] = field(default_factory=dict)

    def check(self, rows: Iterable[BatchRow]) -> list[BatchRow]:
        """Returns the rows that can be made, with their frames and their work.

        Warnings are left to the videos, which have them too.

        Raises:
            KadrError: the only model of all rows cannot be opened.
            Cancelled: the work is cancelled.
        """
        checked = []
        for row in rows:
            check_cancelled()
            with self._refuse(row), ignore_kadr_warnings():
                refuse_missing_media(row.request)
                checked.append(self._resolve(row)[0])
        engines = list(self._engines.values())
        if len(engines) == 1 and isinstance(engines[0], KadrError):
            raise engines[0]
        return checked

    def fetch(self, rows: Sequence[BatchRow]) -> list[BatchRow]:
        """Fetches what checked rows need and is not on disk; returns those that have all of it.

        Raises:
            Cancelled: the work is cancelled.
        """
        outcomes: dict[tuple[Any, ...], KadrError | None] = {}  # by what a fetch depends on
        complete = []
        for row in rows:
            with self._refuse(row):
                with ignore_kadr_warnings():
                    _, resolved = self._resolve(row)
                kinds = frozenset(item.control.kind for item in resolved.controls)
                needs = (canonical_json(row.engine), len(resolved.passes) > 1, kinds)
                if needs not in outcomes:
                    outcomes[needs] = _prepare(self._engine(row.engine), resolved)
                if (error := outcomes[needs]) is not None:
                    raise error
                complete.append(row)
        return complete

    def _resolve(self, row: BatchRow) -> tuple[BatchRow, ResolvedRequest]:
        engine = self._engine(row.engine)
        if row.seconds is not None:
            from kadr.request.complete import with_duration  # loads torch

            row = replace(row, request=with_duration(row.request, row.seconds, engine.spec.recipe))
        resolved = engine.resolve(row.request)
        return replace(row, work=_count_work(resolved)), resolved

    def _engine(self, options: Mapping[str, Any]) -> Engine:
        """Opens a model, each once, also if it cannot be opened."""
        key = canonical_json(options)
        if key not in self._engines:
            try:
                self._engines[key] = self.open_engine(options)
            except Cancelled:
                raise
            except KadrError as error:
                self._engines[key] = error
        if isinstance(opened := self._engines[key], KadrError):
            raise opened
        return opened

    @contextmanager
    def _refuse(self, row: BatchRow) -> Iterator[None]:
        """Takes an error of the block as the reason why a row cannot be made."""
        try:
            yield
        except Cancelled:
            raise
        except KadrError as error:
            self.refused[row.number] = error


def _prepare(engine: Engine, resolved: ResolvedRequest) -> KadrError | None:
    """Fetches what is not on disk; returns the reason where that fails."""
    try:
        engine.prepare(resolved.request)
    except Cancelled:
        raise
    except KadrError as error:
        return error
    return None


def _count_work(resolved: ResolvedRequest) -> float:
    """Returns how much a video computes: megapixels of all frames, times model evaluations."""
    pixels = resolved.sampled_frames * resolved.sampled_size.width * resolved.sampled_size.height
    return pixels * resolved.model_evaluations / max(len(resolved.spans), 1) / 1e6
