"""`kadr batch`: a video of each row of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kadr.cli.flags import options
from kadr.cli.flags.groups import with_flag_groups
from kadr.cli.flags.request import check_choices
from kadr.setting_names import name_settings_by_flags

BATCH_EPILOG = (
    "FILE is a .txt with a prompt per line, a .csv whose header names fields, or a .jsonl with an object per line. A "
    "field of a row comes before the flag. Run it again to make what is missing. docs/guides/batch.md"
)
File = Annotated[
    Path, typer.Argument(metavar="FILE", help="A .txt, .csv or .jsonl with one row a video.", show_default=False)
]


@with_flag_groups(options.BatchFlags)
def batch(file: File, flags: options.BatchFlags) -> None:
    """Make a video of each row of a file, each once, however often the command is stopped and run again.

    Prints the path of the manifest, results.jsonl in the folder of the videos.
    """
    check_choices(flags)
    from kadr.cli.batch import run_batch  # loads the queue

    name_settings_by_flags(False)  # from here on messages are about rows, whose fields they name

    run_batch(file, flags)
