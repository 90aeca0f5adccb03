"""Output of --dry-run: the resolved request, and a table of the steps of each pass."""

from __future__ import annotations

import json
from collections.abc import Iterator

from kadr.cli.terminal.table import format_columns
from kadr.pipeline.display.dry_run_rows import STEP_HEAD, describe_request, pass_headline, step_rows
from kadr.pipeline.dry_run import DryRun
from kadr.quoting import escape


def format_dry_run(dry_run: DryRun, *, as_json: bool) -> str:
    """Returns the dry run as text, or as one JSON object."""
    return json.dumps(dry_run.to_json()) if as_json else "\n".join(escape(line) for line in _lines(dry_run))


def _lines(dry_run: DryRun) -> Iterator[str]:
    yield from format_columns(list(describe_request(dry_run.components, dry_run.resolved)))
    for resolved_pass in dry_run.passes:
        yield ""
        yield pass_headline(resolved_pass)
        yield from format_columns([STEP_HEAD, *step_rows(resolved_pass)])
    yield ""
    yield f"{dry_run.resolved.model_evaluations} model evaluations."
