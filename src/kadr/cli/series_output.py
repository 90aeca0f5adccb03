"""Names for the videos of a series: clip-1.mp4, clip-2.mp4, ... for --output clip.mp4, none of which exists before."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from kadr.cli.flags import options
from kadr.cli.flags.request import encoding_of
from kadr.cli.output_path import is_free, refuse_unwritable_latents, refuse_unwritable_video, reserve_output
from kadr.cli.reservation import reserve_file
from kadr.cli.stdout_video import STDOUT, check_stdout, hidden_video
from kadr.errors import RequestError
from kadr.request.series import RequestSeries
from kadr.request.windows import WINDOWS_SUFFIX
from kadr.validation import check_path


class OutputPaths(NamedTuple):
    """The files of one video. latents: None without --save-latents."""

    video: Path
    latents: Path | None


ReserveOutput = Callable[[int], AbstractContextManager[OutputPaths]]  # takes the number of a video


@contextmanager
def reserve_outputs(series: RequestSeries, flags: options.OutputFlags) -> Iterator[ReserveOutput]:
    """Refuses names that cannot be used, and yields a function that reserves the files of a video while it is made.

    A single video has the names that the flags say, and they are reserved at once. Of several, a named file stands for
    numbered ones, which must be new; without a name, or in a folder, each gets the next free name when it begins.

    Raises:
        As `reserve_output`, and RequestError: a numbered file exists.
    """
    if flags.output == STDOUT:
        check_stdout(number_of_videos=len(series), resume=flags.resume, as_json=flags.json)
    if len(series) > 1:
        with _reserve_numbered(series, flags) as reserve:
            yield reserve
        return
    latents = flags.save_latents
    keywords: dict[str, Any] = {"latents_path": latents, "resume": flags.resume, "encoding": encoding_of(flags)}
    if flags.output == STDOUT:
        with hidden_video() as hidden, reserve_output(series.template, hidden, **keywords) as video:
            yield lambda number: nullcontext(OutputPaths(video, latents))
        return
    with reserve_output(series.template, flags.output, **keywords) as video:
        yield lambda number: nullcontext(OutputPaths(video, latents))


@contextmanager
def _reserve_numbered(series: RequestSeries, flags: options.OutputFlags) -> Iterator[ReserveOutput]:
    template, output, latents = series.template, flags.output, flags.save_latents
    named_videos = None if output is None or output.is_dir() else NumberedFiles(output, len(series), "--output")
    named_latents = None if latents is None else NumberedFiles(latents, len(series), "--save-latents")
    with ExitStack() as base_names:
        if named_videos is None:
            with reserve_output(template, output):
                pass  # the folder can be written
        else:
            refuse_unwritable_video(template, named_videos.path, encoding_of(flags))
            base_names.enter_context(named_videos.reserve_all())
        if named_latents is not None:
            refuse_unwritable_latents(named_latents.path)
            base_names.enter_context(named_latents.reserve_all())

        @contextmanager
        def reserve(number: int) -> Iterator[OutputPaths]:
            with ExitStack() as names:
                named = reserve_output(template, output) if named_videos is None else named_videos.reserve(number)
                video = names.enter_context(named)
                paired = None if named_latents is None else names.enter_context(named_latents.reserve(number))
                yield OutputPaths(video, paired)

        yield reserve


class NumberedFiles:
    """New files beside a path that is named: clip-1.mp4, clip-2.mp4, ... for clip.mp4; clip-01.mp4 if ten or more.

    Args:
        total: number of files.
        flag: that names the path.
    """

    def __init__(self, path: Path, total: int, flag: str) -> None:
        self.path, self.total, self.flag = path, total, flag
        self._digits = len(str(total))

    def numbered(self, number: int) -> Path:
        """Returns the path of a file. number: from 1."""
        return self.path.with_stem(f"{self.path.stem}-{number:0{self._digits}}")

    @contextmanager
    def reserve_all(self) -> Iterator[None]:
        """Keeps another series of this name from beginning while the block runs.

        Raises:
            RequestError: a file exists, or another process makes a series of this name.
        """
        check_path(f"the last of {self.flag}", self.numbered(self.total))
        with reserve_file(self.path, flag=self.flag):
            if existing := self._existing():
                more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
                raise RequestError(
                    f"{existing[0]}{more} exist already, and {self.path} stands for {self.numbered(1)} to "
                    f"{self.numbered(self.total)}. Choose another {self.flag}, or remove them."
                )
            yield

    @contextmanager
    def reserve(self, number: int) -> Iterator[Path]:
        """Reserves one file, and yields its path.

        Raises:
            RequestError: it exists by now, or another process is writing it.
        """
        path = self.numbered(number)
        with reserve_file(path, flag=self.flag):
            if not is_free(path):
                raise RequestError(f"{path} exists: another program wrote it meanwhile. Choose another {self.flag}.")
            yield path

    def _existing(self) -> list[Path]:
        """Returns the files that exist, and those whose windows do, in order; reads the folder once."""
        stem = re.compile(rf"{re.escape(self.path.stem)}-(\d{{{self._digits}}})")
        siblings = [path for path in self.path.parent.iterdir() if path.suffix in (self.path.suffix, WINDOWS_SUFFIX)]
        numbers = {int(match[1]) for path in siblings if (match := stem.fullmatch(path.stem)) is not None}
        paths = [self.numbered(number) for number in sorted(numbers) if 1 <= number <= self.total]
        return [path for path in paths if not is_free(path)]
