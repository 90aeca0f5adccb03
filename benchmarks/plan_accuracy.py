"""Compares the plan with measured memory and time: `python -m benchmarks.plan_accuracy FOLDER`.

Writes the table of docs/reference/memory.md. Each case runs in its own process: `kadr plan` predicts, `kadr generate`
makes the video, and the operating system reports the peak (the largest resident set, with pages of mapped files).
Seconds are from the start of the process to its end. The machine is calibrated first, if it is not.

FOLDER keeps the random models of full width (2B, 13B and T5-XXL with a few blocks, 15 GB), the calibration and the
measurements. `--heavy` adds the models with all blocks (50 GB more), `--only TEXT` runs cases whose name has that text,
`--plan-only` plans again for the measurements of the last run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from kadr.bench.cases import Selection
from kadr.bench.machine import describe_machine
from kadr.bench.model_files import write_random_model
from kadr.bench.peak_memory import process_peak_bytes
from kadr.bench.text_report import machine_line
from tests import doc_tables

PAGE, MARK = doc_tables.DOCS / "reference" / "memory.md", "python -m benchmarks.plan_accuracy"
PROMPT = "a red circle moving right on a black background"
TWO_STEP_FLAGS = "--sigmas 1.0,0.725 --single-pass --guidance 1 --stg 0"
POLL_SECONDS = 0.02
COLUMNS = ("case", "planned peak", "measured peak", "ratio", "planned time", "measured time", "ratio")


@dataclass(frozen=True)
class PlanCase:
    """A video to plan and to make.

    Args:
        flags: of `kadr plan` and `kadr generate`.
        model: "2b" or "13b", with random weights; "" for the model of the flags.
        num_layers: blocks of that model; None for all.
        gguf: type that `kadr quantize` writes its transformer in; "" for bfloat16.
        has_first_image: pass an image as the first frame.
        is_heavy: runs only with --heavy.
    """

    name: str
    flags: str
    model: str = ""
    num_layers: int | None = None
    gguf: str = ""
    has_first_image: bool = False
    is_heavy: bool = False


CASES = (
    PlanCase("demo 128x128x25", ""),
    PlanCase("demo 256x256x49", "--size 256x256 --frames 49 --steps 8"),
    PlanCase("demo 512x512x97, int8", "--size 512x512 --frames 97 --steps 4 --quant int8"),
    PlanCase(
        "demo 768x512x49, CFG and STG", "--size 768x512 --frames 49 --steps 4 --guidance 3 --stg 1 --skip-blocks 4"
    ),
    PlanCase("demo 256x256x25, first frame set", "--size 256x256 --frames 25 --steps 8", has_first_image=True),
    PlanCase("demo 256x256x97, windows of 49", "--size 256x256 --frames 97 --window 49 --overlap 16 --steps 4"),
    PlanCase("demo distilled, two passes to 256x256", "--model demo-distilled"),
    PlanCase("demo 256x256x49, LoRA", "--size 256x256 --frames 49 --steps 8 --lora demo-lora-teal"),
    PlanCase("2B, 4 blocks, 256x256x9", "--size 256x256 --frames 9", "2b", 4),
    PlanCase("2B, 4 blocks, 256x256x9, first frame set", "--size 256x256 --frames 9", "2b", 4, has_first_image=True),
    PlanCase("2B, 4 blocks streamed, 256x256x9", "--size 256x256 --frames 9 --offload blocks", "2b", 4),
    PlanCase("2B, 4 blocks, int8, 256x256x9", "--size 256x256 --frames 9 --quant int8", "2b", 4),
    PlanCase("2B, 4 blocks, Q8_0 file, 256x256x9", "--size 256x256 --frames 9", "2b", 4, "Q8_0"),
    PlanCase("2B, 4 blocks, 512x320x25", "--size 512x320 --frames 25", "2b", 4),
    PlanCase("2B, 4 blocks, 768x512x49", "--size 768x512 --frames 49", "2b", 4),
    PlanCase("13B, 2 blocks, 256x256x9", "--size 256x256 --frames 9", "13b", 2),
    PlanCase("13B, 2 blocks, Q4_K file, 256x256x9", "--size 256x256 --frames 9", "13b", 2, "Q4_K_M"),
    PlanCase("13B, 2 blocks, Q4_K file, 512x320x25", "--size 512x320 --frames 25", "13b", 2, "Q4_K_M"),
    PlanCase("2B 512x320x25", "--size 512x320 --frames 25", "2b", is_heavy=True),
    PlanCase("2B 768x512x49", "--size 768x512 --frames 49", "2b", is_heavy=True),
    PlanCase("13B Q4_K 256x256x9", "--size 256x256 --frames 9", "13b", None, "Q4_K_M", is_heavy=True),
    PlanCase("13B Q4_K 768x512x49", "--size 768x512 --frames 49", "13b", None, "Q4_K_M", is_heavy=True),
)


def cli_arguments(case: PlanCase, folder: Path, scratch: Path) -> list[str]:
    """Returns the arguments of `kadr plan` and `kadr generate`; writes the models that they name."""
    arguments = [PROMPT, *case.flags.split(), "--no-prompt-cache"]
    if case.model:
        # With T5-XXL, which is measured in all stages, of as many blocks.
        selection = Selection(models=(case.model,), num_layers=case.num_layers)
        files = write_random_model(case.model, selection, folder, scratch)
        transformer = _quantize(files.path, case.gguf) if case.gguf else files.path
        arguments += ["--model", str(transformer), "--vae", str(files.path), *TWO_STEP_FLAGS.split()]
        arguments += ["--text-encoder", str(files.text_encoder_folder)]
        if case.num_layers is None:  # random weights of released sizes, which kadr asks for
            arguments += ["--release", f"ltxv-{case.model}-0.9.8-distilled"]
    if case.has_first_image:
        Image.linear_gradient("L").convert("RGB").save(scratch / "first.png")
        arguments += ["--image", str(scratch / "first.png"), "0"]
    return arguments


def _quantize(path: Path, ggml_type: str) -> Path:
    """Returns the GGUF file of a model, written if it is not there."""
    target = path.with_name(f"{path.stem}-{ggml_type}.gguf")
    if not target.exists():
        _run_kadr(["quantize", str(path), str(target), "--type", ggml_type])
    return target


def _run_kadr(arguments: Sequence[str], cache: Path | None = None) -> str:
    environment = {**os.environ} if cache is None else {**os.environ, "KADR_CACHE": str(cache)}
    command = [sys.executable, "-m", "kadr", *arguments]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout


def predict(arguments: Sequence[str], cache: Path, *, calibrate: bool = True) -> dict[str, Any]:
    """Returns the JSON of `kadr plan`.

    Args:
        calibrate: calibrate the machine if it is not calibrated; memory does not need it.
    """
    plan: dict[str, Any] = json.loads(_run_kadr(["plan", *arguments, "--json"], cache))
    if calibrate and not plan["calibrated"]:
        plan = json.loads(_run_kadr(["plan", *arguments, "--json", "--calibrate"], cache))
    return plan


def measure(arguments: Sequence[str], cache: Path, scratch: Path) -> tuple[int, float, float]:
    """Returns the peak bytes of `kadr generate` in a new process, its seconds, and its CPU seconds.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "-m", "kadr", "generate", *arguments, "--output", str(scratch / "out.mp4")]
    start, peak = time.monotonic(), 0
    with (scratch / "stderr").open("w+") as stderr:
        process = subprocess.Popen(
            command, env={**os.environ, "KADR_CACHE": str(cache)}, stdout=subprocess.DEVNULL, stderr=stderr
        )
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            peak = max(peak, process_peak_bytes(process.pid) or 0)
            time.sleep(POLL_SECONDS)
        seconds, (_, status, usage) = time.monotonic() - start, ended
        if status:
            stderr.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {status}: {stderr.read()[-2000:]}")
    return peak, seconds, usage.ru_utime + usage.ru_stime


def table_row(name: str, plan: dict[str, Any], measured: Sequence[float], *, cpu_time: bool = False) -> list[str]:
    """Returns the cells of a case. cpu_time: compare CPU seconds."""
    peak, seconds = measured[0], measured[2 if cpu_time else 1]
    gigabytes = [f"{size / 1e9:.2f} GB" for size in (plan["peak_bytes"], peak)]
    times = [f"{value:.1f} s" for value in (plan["seconds"], seconds)]
    return [name, *gigabytes, f"{plan['peak_bytes'] / peak:.2f}", *times, f"{plan['seconds'] / seconds:.2f}"]


def write_page(rows: Sequence[Sequence[str]], *, cpu_time: bool) -> None:
    """Writes the table and the machine into the page."""
    machine = machine_line(describe_machine(torch.device("cpu")))
    kind = "The measured times are CPU seconds: others used the machine too." if cpu_time else "The machine was idle."
    table = doc_tables.markdown_table(COLUMNS, rows)
    doc_tables.write_table(PAGE, MARK, f"\n{machine}. {kind}\n\n{table}\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog=MARK, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--heavy", action="store_true", help="add the models with all blocks")
    parser.add_argument("--only", default="", help="only cases whose name has this text")
    parser.add_argument("--plan-only", action="store_true", help="reuse the measurements of the last run")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="compare CPU seconds: for a machine that others use, with OMP_NUM_THREADS=1",
    )
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    cache, results_file = args.folder / "cache", args.folder / "measured.json"
    measured: dict[str, Any] = json.loads(results_file.read_text()) if results_file.exists() else {}
    rows = []
    for case in CASES:
        if args.only not in case.name or (case.is_heavy and not args.heavy):
            continue
        if args.plan_only and case.name not in measured:
            continue
        with tempfile.TemporaryDirectory() as name:
            arguments = cli_arguments(case, args.folder, Path(name))
            plan = predict(arguments, cache)
            if not args.plan_only:
                measured[case.name] = measure(arguments, cache, Path(name))
                results_file.write_text(json.dumps(measured, indent=1))
        rows.append(table_row(case.name, plan, measured[case.name], cpu_time=args.cpu_time))
        print(*rows[-1], sep="  ", flush=True)
    if not args.only:
        write_page(rows, cpu_time=args.cpu_time)


if __name__ == "__main__":
    main()
