"""Does to a queue what may happen to it, with the demo model, and prints a table: `make faults`, in about five minutes.

`--write` puts the table into docs/reference/queue.md. `--seed` repeats a run.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests import doc_tables
from tests.jobs.faults import CASES, Outcome, run_case

NAME = "make faults"
PAGE = doc_tables.DOCS / "reference" / "queue.md"
COLUMNS = ("fault", "times", "what happened", "what was kept")


def faults_table(outcomes: Iterable[Outcome]) -> str:
    """Formats the outcomes as a table in Markdown."""
    return doc_tables.markdown_table(
        COLUMNS, [(outcome.fault, str(outcome.times), outcome.happened, outcome.kept) for outcome in outcomes]
    )


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    names = {case.__name__: case for case in CASES}
    parser = argparse.ArgumentParser(prog="python -m tests.write_faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--maker", choices=("demo", "fake"), default="demo")
    parser.add_argument("--cases", nargs="+", choices=names, default=list(names))
    parser.add_argument("--times", type=int, help="how often each is done, instead of the number of each")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE}")
    options = parser.parse_args(arguments)
    log(f"seed {options.seed}")
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="kadr-faults-") as folder:
        for index, name in enumerate(options.cases):
            began, times = time.monotonic(), options.times or CASES[names[name]][0]
            seed = options.seed + index
            outcome = run_case(names[name], Path(folder) / name, options.maker, times, seed)
            result = "cannot be run here" if outcome is None else f"{outcome.happened}; {outcome.kept}"
            log(f"{name} (seed {seed}, {time.monotonic() - began:.0f} s): {result}")
            if outcome is not None:
                outcomes.append(outcome)
    table = faults_table(outcomes)
    print(table, end="")
    if options.write:
        doc_tables.write_table(PAGE, NAME, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
