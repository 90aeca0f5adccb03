"""Output of `kadr doctor`: the machine, the model, and the findings with their fixes; in colour on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from kadr.cli.terminal.errors import writing_stdout
from kadr.cli.terminal.output import MAX_OUTPUT_LINE, print_lines
from kadr.cli.terminal.table import format_columns, format_si
from kadr.diagnosis.finding import ERROR, KINDS, NOTE, QUALITY, SPEED, Finding
from kadr.diagnosis.machine import Machine
from kadr.quoting import show

TITLES = {ERROR: "does not run", QUALITY: "looks bad", SPEED: "is slow", NOTE: "worth knowing"}
_STYLES = {ERROR: "bold red", QUALITY: "bold yellow", SPEED: "bold cyan", NOTE: "bold"}
_FIX_STYLE, _INDENT = "green", "  "
_GIB = 1 << 30
MAX_ALIKE = 3  # findings of one topic with one fix that are printed


class Line(NamedTuple):
    """A line of output, and its style on a terminal."""

    text: str
    style: str = ""


def print_diagnosis(machine: Machine, model: Sequence[tuple[str, str]], findings: Sequence[Finding]) -> None:
    """Prints the diagnosis as text.

    Args:
        model: rows of a label and a value; () where no model was asked for.
    """
    rows = [*_machine_rows(machine), *model]
    _print([*map(Line, format_columns(rows)), *_finding_lines(findings)])


def _print(lines: Sequence[Line]) -> None:
    if not sys.stdout.isatty():
        print_lines(line.text for line in lines)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    with writing_stdout():
        for line in lines:
            console.print(Text(show(line.text, MAX_OUTPUT_LINE), style=line.style), soft_wrap=not line.style)


def _finding_lines(findings: Sequence[Finding]) -> Iterator[Line]:
    if all(finding.kind == NOTE for finding in findings):
        yield from (Line(""), Line("Nothing is wrong.", _FIX_STYLE))
    for kind in KINDS:
        of_kind = [finding for finding in findings if finding.kind == kind]
        if of_kind:
            yield from (Line(""), Line(f"{TITLES[kind]}:", _STYLES[kind]))
        for _, alike in groupby(of_kind, key=lambda finding: (finding.topic, finding.fix)):
            yield from _lines_of_alike(list(alike))


def _lines_of_alike(findings: Sequence[Finding]) -> Iterator[Line]:
    """Yields the lines of findings of one topic with one fix: of many prompts, the first few."""
    topic, fix, count = findings[0].topic, findings[0].fix, len(findings)
    for finding in findings[:MAX_ALIKE]:
        yield Line(f"{_INDENT}{topic}: {finding.message}")
    if count > MAX_ALIKE:
        yield Line(f"{_INDENT}{topic}: and {count - MAX_ALIKE} more like these; --json has all")
    if fix:
        yield Line(f"{_INDENT * 2}fix: {fix}", _FIX_STYLE)


def _machine_rows(machine: Machine) -> Iterator[tuple[str, str]]:
    versions = [f"{name} {version}" for name, version in machine.versions.items() if version is not None]
    yield "versions", ", ".join(versions)
    yield "system", machine.system
    cores = f"{machine.cores} cores, {machine.usable_cores} usable, {machine.threads} threads"
    yield "CPU", f"{machine.cpu}; {cores}"
    yield "instructions", " ".join(machine.instruction_sets) or "unknown"
    yield "device", ", ".join(_device_parts(machine))
    units = [name for name, has in (("bfloat16", machine.has_bfloat16), ("int8", machine.has_fast_int8)) if has]
    yield "dtype", f"{machine.dtype}; units for {' and '.join(units) or 'neither bfloat16 nor int8'}"
    yield "kernels", f"{machine.kernels}, {'' if machine.is_calibrated else 'not '}calibrated"
    yield "memory", ", ".join(_memory_parts(machine))
    for folder in machine.folders:
        sizes = f"{format_si(folder.size_bytes)} bytes, {format_si(folder.free_bytes)} free on the disk"
        yield folder.name, f"{folder.path}: {sizes}"
    yield "model folders", ", ".join(machine.models_dirs) or "none"
    extras = (f"{name} {'yes' if is_installed else 'no'}" for name, is_installed in machine.extras.items())
    yield "extras", ", ".join(extras)
    yield "environment", " ".join(f"{name}={value}" for name, value in machine.environment.items()) or "nothing set"


def _device_parts(machine: Machine) -> Iterator[str]:
    yield machine.device
    if machine.gpu:
        yield machine.gpu
    if machine.gpu_driver:
        yield f"NVIDIA driver {machine.gpu_driver}"
    yield f"torch for CUDA {machine.cuda}" if machine.cuda else "torch without CUDA"


def _memory_parts(machine: Machine) -> Iterator[str]:
    yield f"{machine.memory_bytes / _GIB:.1f} GiB, {machine.free_bytes / _GIB:.1f} free on {machine.device}"
    if machine.memory_limit_bytes is not None:
        yield f"container's limit {machine.memory_limit_bytes / _GIB:.1f}"
    if machine.swap_bytes:
        yield f"{machine.swap_bytes / _GIB:.1f} swapped out"
