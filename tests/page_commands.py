"""Runs the shell and Python blocks of a page as a reader would paste them, in order, in one folder.

bash reads the shell blocks, so that loops, heredocs and continued lines are those of the page. `kadr` is a script there
that hands its arguments, and its stdin where a dash asks for it, to this process, which runs the command line: a
process for each would load torch again.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from kadr.cli.main import main
from tests.stdin_bytes import stdin_bytes

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```(sh|console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ASK = """#!/bin/bash
if [[ " $* " == *" - "* ]]; then cat; fi > "$KADR_STDIN"
printf '%s\\0' "$#" "$@" >&"$KADR_CALLS"
read -r code <&"$KADR_CODES"
cat "$KADR_STDOUT"
exit "$code"
"""
_PYTHON = f'#!/bin/bash\nexec {shlex.quote(sys.executable)} "$@"\n'


class Block(NamedTuple):
    """A fenced block of a page, with the number of lines before it."""

    language: str
    text: str
    lines_before: int


def blocks_of(page: str) -> list[Block]:
    """Returns the shell and Python blocks of a page, in order."""
    return [Block(match[1], match[2], page.count("\n", 0, match.start(2))) for match in _BLOCK.finditer(page)]


def section_of(page: str, title: str) -> str:
    """Returns a section of a page, from its title to the next one of the same level."""
    match = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert match is not None, f"there is no section {title}"
    return match[0]


def run_python(block: Block, namespace: dict[str, Any], file: str) -> None:
    """Runs a Python block in a namespace; its errors have the line numbers of the page."""
    exec(compile("\n" * block.lines_before + block.text, file, "exec"), namespace)


@dataclass(frozen=True)
class Call:
    """One `kadr ...` of a page, with its exit code and output."""

    words: str  # as a shell would quote them, without `kadr`
    code: int
    out: str
    err: str


@dataclass
class PageRunner:
    """A folder in which the blocks of a page are run.

    Args:
        folder: the working folder; `.venv/bin` is made in it, with `kadr` and `python`.
        run_kadr: takes the arguments of a call, and returns it with its exit code.
    """

    folder: Path
    run_kadr: Callable[[list[str]], Call]
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        programs = self.folder / ".venv" / "bin"
        programs.mkdir(parents=True)
        for name, script in (("kadr", _ASK), ("python", _PYTHON)):
            (programs / name).write_text(script)
            (programs / name).chmod(0o755)
        # Without what `make test` tells the makes below it: its ARGS are not those of `make demo`.
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS")
            },
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "src"),
        }

    def run_shell(self, text: str) -> None:
        """Runs one shell block with bash, which stops at the first command that fails.

        Raises:
            AssertionError: it ended with another exit code than 0.
        """
        calls_read, calls_write = os.pipe()
        codes_read, codes_write = os.pipe()
        stdin_file, stdout_file = self.folder / ".venv" / "stdin", self.folder / ".venv" / "stdout"
        environment = {
            **self.environment,
            "KADR_CALLS": str(calls_write),
            "KADR_CODES": str(codes_read),
            "KADR_STDIN": str(stdin_file),
            "KADR_STDOUT": str(stdout_file),
        }
        bash = subprocess.Popen(
            ["bash", "-eu", "-o", "pipefail", "-c", text],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(calls_write, codes_read),
        )
        os.close(calls_write)
        os.close(codes_read)
        with open(calls_read, "rb") as calls, open(codes_write, "wb", buffering=0) as codes:
            while arguments := _next_call(calls):
                with stdin_bytes(stdin_file.read_bytes()):
                    call = self.run_kadr(arguments)
                self.calls.append(call)
                stdout_file.write_text(call.out, "utf-8")
                codes.write(f"{call.code}\n".encode())
        output, _ = bash.communicate(timeout=60)
        last = self.calls[-1].err if self.calls else ""
        assert bash.returncode == 0, f"exit code {bash.returncode} of\n{text}\n{output.decode()}\n{last}"


def _next_call(calls: BinaryIO) -> list[str]:
    """Returns the arguments of the next call, of which there is at least one; [] at the end."""
    count = _until_zero(calls)
    return [_until_zero(calls) for _ in range(int(count))] if count else []


def _until_zero(file: BinaryIO) -> str:
    data = bytearray()
    while (byte := file.read(1)) not in (b"", b"\0"):
        data += byte
    return os.fsdecode(bytes(data))


def run_in_process(arguments: list[str]) -> Call:
    """Runs `kadr` with these arguments in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Call(shlex.join(arguments), code, out.getvalue(), err.getvalue())


def run_as_process(arguments: list[str], folder: Path) -> Call:
    """Runs `kadr` with these arguments as a process of its own, in a folder."""
    process = subprocess.run(
        [sys.executable, "-m", "kadr", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Call(shlex.join(arguments), process.returncode, process.stdout, process.stderr)
