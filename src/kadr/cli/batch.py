"""Runs `kadr batch`: reads its file, checks it or makes its rows, and prints what became of them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kadr.batch.build_row import RowDefaults, read_rows
from kadr.batch.check_rows import RowChecker
from kadr.batch.outcome import INVALID_ROW, MANIFEST_FILE, RowOutcome, invalid_row
from kadr.batch.progress import BatchProgress
from kadr.batch.row import BatchRow
from kadr.batch.run import Batch, BatchResult
from kadr.cli import run
from kadr.cli.commands.generate import DEMO_NOTICE
from kadr.cli.flags import options
from kadr.cli.flags.request import (
    build_request,
    component_options,
    execution_options,
    lora_options,
    refuse_second_pass_flags,
)
from kadr.cli.terminal.batch_watch import LineWatch, watch_batch
from kadr.cli.terminal.daily_notice import print_daily
from kadr.cli.terminal.errors import print_stdout, refuse_failures
from kadr.cli.terminal.output import print_path
from kadr.errors import MediaError, RequestError
from kadr.jobs.engine_maker import EngineMaker
from kadr.request.request import refuse_missing_media
from kadr.spec.lora import Lora
from kadr.validation import check_path, expand_home, is_same_file

if TYPE_CHECKING:
    from kadr.pipeline.engine import Engine

# Arguments of `Engine.open` that a row's model depends on; the others are how it is run, on this machine and now.
_MODEL_OPTIONS = ("model", "release", "vae", "text_encoder", "second_model", "upscaler", "lora_partial", "merge_loras")


def run_batch(file: Path, flags: options.BatchFlags) -> None:
    """Makes what is missing of a batch, or checks its rows, and prints the result.

    Raises:
        KadrError: rows failed, which was reported; or nothing could be made.
    """
    check_path("the file of the batch", file)
    path = Path(os.path.abspath(expand_home(file)))
    defaults, worker_options = _read_defaults(flags)
    rows, invalid = read_rows(path, defaults)
    devices = flags.model.device or ["auto"]
    checker = RowChecker(partial(_open_engine, {**worker_options, "device": devices[0]}))
    if flags.batch.dry_run:
        _check_only(rows, invalid, checker, as_json=flags.batch.json)
        return
    folder = _make_folder(flags.batch.out, path)
    if flags.model.model is None and flags.model.config is None:
        print_daily("demo", DEMO_NOTICE)
    makers = [partial(EngineMaker, {**worker_options, "device": device}, writes_stills=False) for device in devices]
    began = time.monotonic()
    with watch_batch() as watch:
        retries = flags.batch.retry_failed
        result = Batch(folder, rows, invalid, checker, makers, watch, retries_failed=retries).run()
    _print_result(result, time.monotonic() - began, as_json=flags.batch.json)


def _read_defaults(flags: options.BatchFlags) -> tuple[RowDefaults, dict[str, Any]]:
    """Returns the defaults of all rows, and what workers open every model with, as keywords of `Engine.open`."""
    request = build_request("", flags)
    refuse_second_pass_flags(request, flags.model)
    refuse_missing_media(request)
    keywords = {**component_options(flags.model, request), **lora_options(flags.model)}
    loras = [Lora.parse(lora) for lora in keywords.pop("loras", ())]
    engine = {name: _absolute(keywords.pop(name)) for name in _MODEL_OPTIONS if name in keywords}
    defaults = RowDefaults(
        request=request,
        engine={"model": "demo", **engine},
        loras=[replace(lora, path=_absolute(lora.path)) for lora in loras],
        seconds=flags.video.seconds,
        has_recipe="recipe" in keywords,
    )
    if flags.model.no_prompt_cache:
        keywords["prompt_cache"] = False
    return defaults, {**keywords, **execution_options(flags.model)}


def _absolute(value: Any) -> Any:
    """Returns a value of a flag as JSON can hold it; a path that exists is absolute, a name stays as it is."""
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    if isinstance(value, str | Path):
        path = expand_home(value)
        return os.path.abspath(path) if os.path.exists(path) else str(value)
    return value


def _open_engine(keywords: Mapping[str, Any], engine: Mapping[str, Any]) -> Engine:
    """Opens the model of a row in this process: its headers are read, and no weight."""
    return run.open_engine(**{**keywords, **engine})


def _make_folder(folder: Path, file: Path) -> Path:
    """Returns the folder of the videos, absolute, and makes it where it is missing.

    Raises:
        MediaError: it cannot be made.
        RequestError: the file of the batch would be overwritten by the manifest.
    """
    check_path("--out", folder)
    folder = Path(os.path.abspath(expand_home(folder)))
    if is_same_file(file, folder / MANIFEST_FILE):
        raise RequestError(f"{file} is the manifest of {folder}, which is written anew. Name another file or --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error
        raise MediaError(f"the folder {folder} cannot be made: {reason}. Choose another --out.") from error
    return folder


def _check_only(rows: Sequence[BatchRow], invalid: Sequence[RowOutcome], checker: RowChecker, *, as_json: bool) -> None:
    """Checks every row, and prints how many can be made."""
    valid, total = len(checker.check(rows)), len(rows) + len(invalid)
    refused = [invalid_row(row.number, row.line, checker.refused[row.number]) for row in rows
               if row.number in checker.refused]  # fmt: skip
    failed = sorted([*invalid, *refused], key=lambda outcome: outcome.number)
    watch, progress = LineWatch(), BatchProgress.of_outcomes(failed)
    for outcome in failed:
        watch.show_outcome(progress, outcome)
    if as_json:
        print_stdout(json.dumps({"rows": total, "valid": valid, "invalid": [each.to_json() for each in failed]}))
    else:
        print_stdout(f"{valid} of {total} rows can be made")
    refuse_failures([each.number for each in failed], total, "rows", "Mend them, and check again.")


def _print_result(result: BatchResult, seconds: float, *, as_json: bool) -> None:
    """Prints the manifest's path, or a JSON summary; ends with an error if rows failed."""
    total, failed = len(result.outcomes), result.failed
    summary = {
        "rows": total,
        "completed": total - len(failed),
        "failed": len(failed),
        "made": result.num_made,
        "seconds": round(seconds, 3),
        "manifest": str(result.manifest),
    }
    outcome = f"the batch is finished, and {result.manifest} is written, but not its path:"
    if as_json:
        print_stdout(json.dumps(summary), outcome=outcome)
    else:
        print_path(result.manifest, outcome=outcome)
    has_retried = any(each.error is not None and each.error.code != INVALID_ROW for each in failed)
    retry = " or make those again with --retry-failed" if has_retried else ""
    way_out = f"Mend them and run it again{retry}; {result.manifest.name} has the reasons."
    refuse_failures([each.number for each in failed], total, "rows", way_out)
