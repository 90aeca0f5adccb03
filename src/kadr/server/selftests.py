"""Runs `kadr selftest` in a process of its own, one at a time, and tells how far it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import IO, Any

from kadr.hidden_paths import PathHider
from kadr.quoting import MAX_LINE, shorten
from kadr.selftest.progress import parse_progress_line
from kadr.server.errors import ApiError

NONE_YET, IN_PROGRESS, COMPLETED, FAILED = "none", "in_progress", "completed", "failed"
TERMINATE_SECONDS = 5.0  # in which a process ends after a signal; then it is killed
# Options of `Engine.open` that the server's models have, and the flags for them.
_OPTION_FLAGS = {
    name: f"--{name.replace('_', '-')}" for name in ("dtype", "quant", "offload", "text_encoder", "vae", "upscaler")
}
_OPTION_FLAGS["models_dirs"] = "--models-dir"


@dataclass(frozen=True)
class SelftestState:
    """The last self-test of a server.

    Args:
        status: `NONE_YET`, `IN_PROGRESS`, `COMPLETED` (every stage passed) or `FAILED`.
        model: name of the model; None before the first.
        stages: those that ended, each with name, verdict and problem.
        report: the text to paste into an issue; of one that ended without, its error.
    """

    status: str = NONE_YET
    model: str | None = None
    stages: tuple[Mapping[str, Any], ...] = ()
    report: str | None = None


@dataclass
class Selftests:
    """The self-tests of a server.

    Args:
        engine_options: arguments of `Engine.open` that all models of the server have.
        device: that is tested; None for the fastest.
        hide: takes folders out of messages.
        command: what is run before the flags.
    """

    engine_options: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    hide: PathHider = field(default_factory=PathHider)
    command: Sequence[str] = (sys.executable, "-m", "kadr", "selftest")

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._state = SelftestState()
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def state(self) -> SelftestState:
        """The last self-test, as far as it is."""
        with self._lock:
            return self._state

    def start(self, name: str, model: str) -> SelftestState:
        """Starts a self-test.

        Args:
            name: of the model, as clients know it.
            model: what `Engine.open` takes for it.

        Raises:
            ApiError: one is in progress, or the server stops.
        """
        with self._lock:
            if self._is_closed:
                raise ApiError(503, "the server stops.", code="stopping")
            if self._state.status == IN_PROGRESS:
                raise ApiError(
                    409,
                    f"a self-test of {self._state.model} is in progress. GET /v1/selftest tells how far it is.",
                    code="selftest_in_progress",
                )
            self._process, output = _start_process([*self.command, *self._flags(), "--", model])
            self._state = SelftestState(IN_PROGRESS, name)
            self._thread = threading.Thread(target=self._follow, args=(self._process, output, name), daemon=True)
            self._thread.start()
            return self._state

    def close(self) -> None:
        """Ends the process of a self-test in progress, and starts no other."""
        with self._lock:
            self._is_closed, process, thread = True, self._process, self._thread
        if process is None or thread is None:
            return
        process.terminate()
        try:
            process.wait(TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        thread.join(TERMINATE_SECONDS)

    def _flags(self) -> list[str]:
        flags = ["--json"] + (["--device", self.device] if self.device else [])
        for name, flag in _OPTION_FLAGS.items():
            values = self.engine_options.get(name)
            for value in [values] if isinstance(values, str) else values or ():
                flags += [flag, value]
        return flags

    def _follow(self, process: subprocess.Popen[str], output: IO[str], name: str) -> None:
        """Reads what a process says until it ends."""
        stages: list[Mapping[str, Any]] = []
        last_line = ""
        assert process.stderr is not None
        with output, process.stderr as lines:
            for line in lines:
                last_line = line.strip() or last_line
                if (stage := parse_progress_line(line)) is not None:
                    stages.append({**stage, "problem": self.hide(stage["problem"])})
                    self._set(SelftestState(IN_PROGRESS, name, tuple(stages)))
            code = process.wait()
            output.seek(0)
            report = _read_report(output, lambda: self.hide(shorten(last_line, MAX_LINE)))
        self._set(SelftestState(FAILED if code else COMPLETED, name, tuple(stages), report))

    def _set(self, state: SelftestState) -> None:
        with self._lock:
            self._state = state


def _start_process(command: Sequence[str]) -> tuple[subprocess.Popen[str], IO[str]]:
    """Returns a process, and the file that it writes its results to: they may be more than a pipe holds."""
    with ExitStack() as stack:
        output = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # no module of the current folder in the place of kadr's
        )
        stack.pop_all()  # whoever follows the process closes it
    return process, output


def _read_report(output: IO[str], describe_error: Callable[[], str]) -> str:
    """Returns the text of the report; without one, the error that ended the process."""
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(output.read())["report"])
    return describe_error()
