"""Makes the videos of one command, one after another on one engine; a failure is reported, and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kadr.cli import enhance, run
from kadr.cli.flags import options
from kadr.cli.flags.request import build_request, encoding_of
from kadr.cli.prompts import STDIN, check_prompt_source, read_prompt_lines
from kadr.cli.series_output import ReserveOutput
from kadr.cli.stdout_video import STDOUT
from kadr.cli.terminal.errors import (
    MAX_ERROR_LINE,
    explain_error,
    print_error,
    print_stderr,
    print_stdout,
    refuse_failures,
)
from kadr.cli.terminal.preview import open_preview
from kadr.cli.terminal.progress import show_progress
from kadr.errors import ignore_kadr_warnings
from kadr.pipeline.series.encode_ahead import ENCODED_AHEAD, encode_prompts_ahead
from kadr.pipeline.series.loop import run_series
from kadr.quoting import quote, show
from kadr.request.request import Request
from kadr.request.series import RequestSeries, SeriesItem

if TYPE_CHECKING:
    from kadr.pipeline.engine import Engine
    from kadr.text.enhance import Enhancer

MakeVideo = Callable[[SeriesItem], object]
_MAX_SEED, _MAX_PROMPT = 20, 60  # characters that a message shows
REASONS_ABOVE = "The reasons are above."


def build_series(prompt: str | None, flags: options.GenerateFlags) -> RequestSeries:
    """Builds the videos that a command asks for, with an empty prompt where prompts are yet to be read.

    Args:
        prompt: the argument, None where it is left out.

    Raises:
        BadParameter: no prompt, or two sources of prompts.
        RequestError: a value out of its range.
    """
    check_prompt_source(prompt, flags.series.prompt_file)
    template = build_request("" if prompt is None or prompt == STDIN else prompt, flags)
    return RequestSeries(template, (template.prompt,), flags.series.variations)


def read_prompts(series: RequestSeries, prompt: str | None, flags: options.GenerateFlags) -> RequestSeries:
    """Reads the prompts of a series from a file or stdin, if that is where they are; see `build_series`.

    Raises:
        BadParameter: a flag that is for one video alone.
        RequestError: prompts that cannot be read, or a single one that does not fit.
    """
    if prompt is None or prompt == STDIN:
        series = replace(series, prompts=read_prompt_lines(flags.series.prompt_file))
    if len(series) == 1:
        return replace(series, template=series.request(series.prompts[0], series.template.seed))
    if flags.output.resume:
        raise typer.BadParameter(
            f"it resumes one video, and this command makes {len(series)}. Give that one's prompt, --seed and --output.",
            param_hint="--resume",
        )
    return series


class SeriesWriter:
    """Writes the videos of a series.

    Args:
        reserve: reserves the files of a video by its number.
        enhancer: enhances each prompt once: its variations share the answer.
    """

    def __init__(
        self,
        engine: Engine,
        series: RequestSeries,
        reserve: ReserveOutput,
        enhancer: Enhancer | None,
        flags: options.GenerateFlags,
    ) -> None:
        self.engine, self.series, self.reserve, self.enhancer = engine, series, reserve, enhancer
        self.flags, self.is_encoded_ahead = flags.output, enhancer is None and not flags.model.no_prompt_cache
        self.preview = open_preview() if flags.output.preview else None
        self.encoding = encoding_of(flags.output)
        self._num_finished = 0
        self._enhanced: dict[str, Request] = {}  # by prompt

    def write_all(self) -> None:
        """Writes every video, and prints the path of each, or its JSON summary, when it is complete.

        Raises:
            KadrError: some failed, which was reported; or a video failed for a reason that concerns all.
        """
        items = _encoded_ahead(self.engine, self.series) if self.is_encoded_ahead else self.series
        try:
            failed = _make_each(self.engine, self.series, self._write, items)
        except BaseException:
            if self._num_finished:
                print_stderr(f"finished {self._num_finished} of {len(self.series)} videos")
            raise
        refuse_failures(failed, len(self.series), "videos", REASONS_ABOVE)

    def _write(self, item: SeriesItem) -> None:
        total, position = len(self.series), None
        if total > 1:
            position = item.number, total
            print_stderr(f"{_position(item, total)}, seed {show(item.seed)}: {item.prompt}")
        request = self.series.request(item.prompt, item.seed)
        with self.reserve(item.number) as (video, latents):
            run.write_video(
                self.engine,
                self._enhance(request, video),
                video,
                latents_path=latents,
                as_json=self.flags.json,
                resume=self.flags.resume,
                position=position,
                preview=self.preview,
                encoding=self.encoding,
                to_stdout=self.flags.output == STDOUT,
            )
        self._num_finished += 1

    def _enhance(self, request: Request, video: Path) -> Request:
        if request.prompt not in self._enhanced:
            self._enhanced[request.prompt] = enhance.enhance_request(
                self.engine, request, self.enhancer, video, resume=self.flags.resume
            )
        enhanced = self._enhanced[request.prompt]
        return replace(request, prompt=enhanced.prompt, original_prompt=enhanced.original_prompt)


def print_dry_runs(engine: Engine, series: RequestSeries, *, as_json: bool) -> None:
    """Prints every step of every video, without making it; errors as for `SeriesWriter.write_all`."""
    from kadr.cli.terminal import dry_run  # loads torch

    total = len(series)

    def print_one(item: SeriesItem) -> None:
        result = engine.dry_run(series.request(item.prompt, item.seed))
        heading = "" if total == 1 or as_json else f"{_position(item, total)}\n\n"
        gap = "\n" if heading and item.number < total else ""
        print_stdout(f"{heading}{dry_run.format_dry_run(result, as_json=as_json)}{gap}")

    refuse_failures(_make_each(engine, series, print_one, series), total, "videos", REASONS_ABOVE)


def _make_each(engine: Engine, series: RequestSeries, make: MakeVideo, items: Iterable[SeriesItem]) -> list[int]:
    """Makes every video; of several, reports those that fail, and goes on. Returns the numbers of those.

    Raises:
        KadrError: the only video failed, or one for a reason that concerns all.
    """
    total, failed = len(series), list[int]()
    if total == 1:
        for item in items:
            make(item)
        return failed

    def report(item: SeriesItem, error: Exception) -> None:
        failed.append(item.number)
        prompt, seed = quote(item.prompt, _MAX_PROMPT), show(item.seed, _MAX_SEED)
        message = f"{_position(item, total)} failed ({prompt}, seed {seed}): {explain_error(error)}"
        print_error(error, message, limit=MAX_ERROR_LINE)

    with ignore_kadr_warnings():  # printed with each video
        engine.resolve(series.template)  # refuses flags that suit no video
    run_series(items, make, report)
    return failed


def _position(item: SeriesItem, total: int) -> str:
    return f"video {item.number} of {total}"


def _encoded_ahead(engine: Engine, series: RequestSeries) -> Iterator[SeriesItem]:
    """Yields the videos of a series; encodes the prompts of those that come next."""
    for item in series:
        index, variation = divmod(item.number - 1, series.variations)
        prompts = series.prompts[index : index + ENCODED_AHEAD]
        if variation == 0 and index % ENCODED_AHEAD == 0 and len(prompts) > 1:
            with show_progress() as watch:
                encode_prompts_ahead(engine, series, prompts, watch=watch)
        yield item
