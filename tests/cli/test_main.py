"""`kadr` itself: help, version, and progress on a terminal and in a pipe."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kadr.cli.terminal import progress
from kadr.pipeline.progress import Progress
from kadr.version import __version__
from tests.cli.conftest import CommandResult

Run = Callable[..., CommandResult]
SOURCES = Path(__file__).parents[2] / "src"
HEAVY = {"torch", "numpy", "av", "PIL", "safetensors", "huggingface_hub", "rich", "tokenizers"}


def test_version_goes_to_stdout(kadr: Run) -> None:
    assert kadr("--version") == (0, f"kadr {__version__}\n", "")


def test_help_names_every_verb(kadr: Run) -> None:
    result = kadr("--help")
    assert (result.code, result.err) == (0, "")
    assert all(verb in result.out for verb in ("generate", "rerun", "inspect", "models"))


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["rerun", "--help"], ["--version"]])
def test_help_and_version_load_no_heavy_library(args: list[str]) -> None:
    code = "import sys; from kadr.cli.main import main\ntry: main(sys.argv[1:])\n"
    code += "except SystemExit: print(*sys.modules, file=sys.stderr)"
    process = subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "kadr.cli.main" in process.stderr.split()
    assert HEAVY.isdisjoint(process.stderr.split())


def test_python_m_kadr_is_the_command() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "kadr", "--version"],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (process.returncode, process.stdout) == (0, f"kadr {__version__}\n")


PRINT_PATH = """
import sys
from pathlib import Path
from kadr.cli import main
from kadr.cli.terminal.errors import print_stderr
from kadr.cli.terminal.output import print_path

def app(args, prog_name):
    print_path("out.mp4")
    print_stderr("done")
    Path(sys.argv[1]).write_text(str(sys.stdin.read()))

main.app = app
main.main()
"""


@pytest.mark.skipif(os.name != "posix", reason="closes descriptors by a shell of POSIX")
def test_closed_standard_streams_lead_to_nothing(tmp_path: Path) -> None:
    process = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", PRINT_PATH, tmp_path / "end"],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        timeout=60,
        check=False,
    )
    assert process.returncode == 0
    assert (tmp_path / "end").read_text() == ""


@pytest.mark.parametrize("args", [["dance"], ["generate", "x", "--wat"]])
def test_bad_usage_ends_with_2(kadr: Run, args: list[str]) -> None:
    result = kadr(*args)
    assert (result.code, result.out) == (2, "")
    assert "Error: No such" in result.err


def test_terminal_gets_a_bar_per_stage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress.show_progress() as watch:
        watch(Progress("denoise", 0, 4))
        watch(Progress("denoise", 2, 4, eta=61.0))
        print("data")
        watch(Progress("decode", 9, 9, eta=0.0))
    output = terminal.getvalue()
    assert all(text in output for text in ("denoising", "2/4", "decoding", "9/9"))
    assert "data" not in output
    assert capsys.readouterr().out == "data\n"


def test_letters_that_the_terminal_lacks_are_printed_as_escapes() -> None:
    """As on Windows, whose pipes and consoles often have 256 letters; stdout would raise otherwise."""
    process = subprocess.run(
        [sys.executable, "-m", "kadr", "generate", "кадр", "--dry-run", "--model", "demo"],
        env={**os.environ, "PYTHONIOENCODING": "cp1252", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
    )
    assert process.returncode == 0, process.stderr
    assert rb"\u043a\u0430\u0434\u0440" in process.stdout
