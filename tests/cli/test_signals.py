"""Ctrl-C, TERM and HUP: the first cancels, the second ends at once, and neither leaves a file. Each in a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from kadr.cli.terminal.signals import CANCELLED, CANCELLING, EXIT_CANCELLED
from tests.fakechat import ChatRequest, Reply, serve_fake_chat

SOURCES = Path(__file__).parents[2] / "src"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MAX_SECONDS = 20.0  # until a process ends; other tests run at the same time
LONG = ("--size", "2048x2048", "--frames", "257", "--sigmas", "1.0,0.5")  # one layer of the demo takes minutes
SHORT_LAYERS = ("--size", "256x256", "--frames", "25", "--steps", "200")
# A program that works for as long as it is let, like a verb, and loads no torch.
PROGRAM = """
import sys, time, typer
from pathlib import Path
from kadr.cancellation import cancellable, check_cancelled, remove_if_ended
from kadr.cli.terminal.errors import handle_errors
from kadr.cli.terminal.signals import handle_signals

def verb():
    half = Path("half.part")
    with cancellable(), remove_if_ended(half.unlink):
        half.write_text("half")
        print("working", file=sys.stderr, flush=True)
        try:
            while True:
                {work}
        finally:
            half.unlink(missing_ok=True)

app = typer.Typer()
app.command()(handle_errors()(verb))
with handle_signals():
    app()
"""
CHECKS, NEVER_CHECKS = "check_cancelled(); time.sleep(0.01)", "sum(range(10_000_000))"


class Ending(NamedTuple):
    """Exit code, stdout and lines of stderr of a process."""

    code: int
    out: str
    err: list[str]


class RunningCommand:
    """A process in an empty folder, whose stderr goes to a file beside it."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.folder, self.log = folder / "work", folder / "stderr"
        self.folder.mkdir()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *args],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(SOURCES)},
                stdout=subprocess.PIPE,
                stderr=log,
                preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in SIGNALS],
            )

    def wait_for(self, text: str) -> None:
        """Waits until the text is on stderr."""
        self._wait_until(lambda: text in self.log.read_text("utf-8"))

    def wait_until_signals_are_handled(self) -> None:
        """Waits until the process catches TERM, milliseconds after its start."""
        status = Path(f"/proc/{self.process.pid}/status")

        def catches() -> bool:
            line = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt"))
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

        self._wait_until(catches)

    def _wait_until(self, condition: object) -> None:
        end = time.monotonic() + 60
        while not condition():  # type: ignore[operator]
            assert self.process.poll() is None, self.log.read_text("utf-8")
            assert time.monotonic() < end, self.log.read_text("utf-8")
            time.sleep(0.01)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = MAX_SECONDS) -> Ending:
        """Waits for the end. Raises: TimeoutExpired: it takes longer."""
        out, _ = self.process.communicate(timeout=seconds)
        return Ending(self.process.returncode, out.decode(), self.log.read_text("utf-8").splitlines())


@contextmanager
def running(folder: Path, *args: str) -> Iterator[RunningCommand]:
    command = RunningCommand(folder, *args)
    try:
        yield command
    finally:
        command.process.kill()
        command.process.wait()


def generate(*flags: str) -> tuple[str, ...]:
    return "-m", "kadr", "generate", "a red circle", "--model", "demo", "--device", "cpu", *flags


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_cancels_at_the_next_check(number: signal.Signals, tmp_path: Path) -> None:
    with running(tmp_path, "-c", PROGRAM.format(work=CHECKS)) as command:
        command.wait_for("working")
        command.signal(number)
        assert command.wait() == Ending(EXIT_CANCELLED, "", ["working", CANCELLING, CANCELLED])
        assert os.listdir(command.folder) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_second_signal_ends_a_process_that_never_checks(number: signal.Signals, tmp_path: Path) -> None:
    with running(tmp_path, "-c", PROGRAM.format(work=NEVER_CHECKS)) as command:
        command.wait_for("working")
        assert os.listdir(command.folder) == ["half.part"]
        command.signal(number)
        command.wait_for(CANCELLING)
        assert command.process.poll() is None
        command.signal(number)
        assert command.wait() == Ending(EXIT_CANCELLED, "", ["working", CANCELLING, CANCELLED])
        assert os.listdir(command.folder) == []


def test_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + PROGRAM.format(work=CHECKS)
    with running(tmp_path, "-c", program) as command:
        command.wait_for("working")
        command.signal(signal.SIGHUP)
        time.sleep(0.2)
        assert command.process.poll() is None
        command.signal(signal.SIGTERM)
        assert command.wait().err == ["working", CANCELLING, CANCELLED]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("delay", [0.0, 0.15, 0.7])
def test_signal_during_imports_is_no_traceback(number: signal.Signals, delay: float, tmp_path: Path) -> None:
    with running(tmp_path, *generate(*LONG)) as command:
        command.wait_until_signals_are_handled()
        time.sleep(delay)
        command.signal(number)
        assert command.wait() == Ending(EXIT_CANCELLED, "", [CANCELLED])
        assert os.listdir(command.folder) == []


def test_first_signal_cancels_a_video_and_leaves_nothing(tmp_path: Path) -> None:
    with running(tmp_path, *generate(*SHORT_LAYERS)) as command:
        command.wait_for("encoding the prompt: 2 of 2")
        command.signal(signal.SIGINT)
        ending = command.wait()
        assert (ending.code, ending.out, ending.err[-2:]) == (EXIT_CANCELLED, "", [CANCELLING, CANCELLED])
        assert os.listdir(command.folder) == []


def test_first_signal_stops_a_series_and_keeps_finished_videos(tmp_path: Path) -> None:
    tiny = ("--size", "64x64", "--frames", "9", "--steps", "200", "--variations", "3", "--output", "clip.mp4")
    with running(tmp_path, *generate(*tiny)) as command:
        command.wait_for("encoding the prompt, video 2 of 3: 2 of 2")
        command.signal(signal.SIGINT)
        ending = command.wait()
        assert (ending.code, ending.out) == (EXIT_CANCELLED, "clip-1.mp4\n")
        assert ending.err[-3:] == [CANCELLING, "finished 1 of 3 videos", CANCELLED]
        assert os.listdir(command.folder) == ["clip-1.mp4"]


def test_second_signal_ends_a_video_inside_a_layer_of_minutes(tmp_path: Path) -> None:
    with running(tmp_path, *generate(*LONG)) as command:
        command.wait_for("encoding the prompt: 2 of 2")
        time.sleep(1.0)
        command.signal(signal.SIGTERM)
        command.wait_for(CANCELLING)
        command.signal(signal.SIGTERM)
        ending = command.wait()
        assert (ending.code, ending.out, ending.err[-2:]) == (EXIT_CANCELLED, "", [CANCELLING, CANCELLED])
        assert os.listdir(command.folder) == []


def test_quantizing_is_cancelled_and_leaves_nothing(tmp_path: Path) -> None:
    source = SOURCES / "kadr" / "assets" / "demo" / "demo.safetensors"
    with running(tmp_path, "-m", "kadr", "quantize", str(source), "out.gguf", "--type", "Q3_K") as command:
        command._wait_until(lambda: os.listdir(command.folder) != [])
        command.signal(signal.SIGINT)
        ending = command.wait()
        assert (ending.code, ending.out, ending.err[-1]) == (EXIT_CANCELLED, "", CANCELLED)
        assert os.listdir(command.folder) == []


def test_waiting_for_an_endpoint_ends_at_once(tmp_path: Path) -> None:
    with serve_fake_chat() as chat:
        flags = generate("--enhance", chat.url)
        with running(tmp_path, *flags) as command:

            def interrupt(chat_request: ChatRequest) -> Reply:
                command.signal(signal.SIGINT)
                return Reply(delay_seconds=60.0)

            chat.reply = interrupt
            ending = command.wait(60.0)
        assert (ending.code, ending.out, ending.err[-1]) == (EXIT_CANCELLED, "", CANCELLED)
        assert os.listdir(command.folder) == []
