"""The report of a self-test: what was tested, where, and the text to paste into an issue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kadr.bench.machine import describe_machine
from kadr.checkpoints.digest import SHA256_HEX_DIGITS, compute_digest
from kadr.errors import KadrError
from kadr.hidden_paths import PathHider
from kadr.memory.device import DTYPES
from kadr.quoting import show
from kadr.selftest.result import FAIL, PASS, SelftestReport, StageResult
from kadr.selftest.subject import Subject

_MACHINE_KEYS = ("kadr", "revision", "torch", "python", "system", "cpu", "cores", "instruction_sets", "gpu", "cuda")
MAX_REPORT_NAME = 80  # characters of a model's or file's name


def build_report(subject: Subject, stages: tuple[StageResult, ...]) -> SelftestReport:
    """Returns the report, with the identity of the files and without their folders."""
    spec = subject.spec
    folders = {path.parent if path.is_file() else path for path in _files(subject).values()}
    hide = PathHider(folder for folder in (*folders, Path.home()))
    return SelftestReport(
        model=Path(spec.name).name,
        identity=_identity(subject),
        settings={
            "device": str(spec.device),
            "dtype": next(name for name, dtype in DTYPES.items() if dtype == spec.dtype),
            "quant": spec.quant,
            "offload": spec.offload,
            "release": spec.release.name if spec.release else "unknown",
            "size": f"{subject.size} with {subject.frames} frames",
        },
        machine=describe_machine(spec.device),
        stages=tuple(_without_folders(stage, hide) for stage in stages),
    )


def report_lines(report: SelftestReport) -> Iterator[str]:
    """Yields the lines of the report: verdicts first, then every figure."""
    yield f"kadr selftest of {show(report.model, MAX_REPORT_NAME)}: {PASS if report.passed else FAIL}"
    machine = [f"{key} {_plain(report.machine[key])}" for key in _MACHINE_KEYS if report.machine.get(key)]
    yield f"machine: {', '.join(machine)}"
    yield f"settings: {', '.join(f'{key} {value}' for key, value in report.settings.items())}"
    for component, files in report.identity.items():
        for file in files:
            yield f"{component}: {show(file['name'], MAX_REPORT_NAME)}, {file['bytes']} bytes, sha256 {file['sha256']}"
    for stage in report.stages:
        yield ""
        verdict = stage.verdict.upper() if stage.verdict == FAIL else stage.verdict
        yield f"{verdict}: {stage.name} ({stage.seconds:.1f} s)"
        if stage.problem:
            yield f"  {stage.problem}"
        for check in stage.checks:
            yield f"  {'ok  ' if check.passed else 'FAIL'} {check.describe()}"


def _identity(subject: Subject) -> dict[str, list[dict[str, Any]]]:
    identity: dict[str, list[dict[str, Any]]] = {}
    for (component, _), path in _files(subject).items():
        entry = {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}
        identity.setdefault(component, []).append(entry)
    return identity


def _files(subject: Subject) -> dict[tuple[str, str], Path]:
    """Returns the weight files of each component; a file that several components share counts once."""
    spec = subject.spec
    sources = {
        "model": spec.checkpoint.sources["transformer"],
        "VAE": spec.vae_checkpoint.sources["vae"],
        "text encoder": spec.text_encoder_checkpoint.source,
        **{f"LoRA {number}": file.source for number, file in enumerate(spec.loras.files, 1)},
    }
    found: dict[Path, str] = {}
    for component, source in sources.items():
        for path in sorted({info.file for info in source.infos.values()}):
            found.setdefault(path, component)
    return {(component, str(path)): path for path, component in found.items() if path.is_file()}


def _sha256(path: Path) -> str:
    try:
        return compute_digest(path, like="0" * SHA256_HEX_DIGITS)
    except (OSError, KadrError) as error:
        return f"not read: {type(error).__name__}"


def _without_folders(stage: StageResult, hide: PathHider) -> StageResult:
    return replace(stage, problem=hide(stage.problem))


def _plain(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
