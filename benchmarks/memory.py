"""Compares the plan with measured memory and time: `python -m benchmarks.memory FOLDER`.

Writes the table of docs/reference/memory.md. Each case runs in its own process: `kadr plan` predicts, `kadr generate`
makes the video, and the operating system reports the peak (the largest resident set, with pages of mapped files).
FOLDER has the random models of `python -m benchmarks.full_size FOLDER`, and for 13B the file that `kadr quantize` made
of it.
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

from PIL import Image

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "memory.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PROMPT = "a red circle moving right on a black background"
TWO_STEP_FLAGS = ("--sigmas", "1.0,0.725", "--single-pass")
FILE_2B, FILE_13B, GGUF_13B = (
    "random-2b-0.9.8-distilled.safetensors",
    "random-13b-0.9.8-distilled.safetensors",
    "random-13b-Q4_K_M.gguf",
)


@dataclass(frozen=True)
class MemoryCase:
    """A video to generate.

    Args:
        model: file name in the folder; None is the demo.
        vae: file name of another VAE; None is the model's.
        has_first_image: pass an image as the first frame.
    """

    name: str
    flags: str
    model: str | None = None
    vae: str | None = None
    has_first_image: bool = False


CASES = (
    MemoryCase("demo 128x128x25", ""),
    MemoryCase("demo 256x256x49", "--size 256x256 --frames 49 --steps 4"),
    MemoryCase("demo 128x128x25, first frame set", "--steps 4", has_first_image=True),
    MemoryCase("demo distilled, two passes to 256x256", "--model demo-distilled"),
    MemoryCase("demo 512x512x97, int8", "--size 512x512 --frames 97 --steps 2 --quant int8"),
    MemoryCase("2B bf16 256x256x9", "--size 256x256 --frames 9", FILE_2B),
    MemoryCase("2B bf16 512x320x25", "--size 512x320 --frames 25", FILE_2B),
    MemoryCase("2B bf16 512x320x121", "--size 512x320 --frames 121", FILE_2B),
    MemoryCase("2B bf16 704x480x25, first frame set", "--size 704x480 --frames 25", FILE_2B, has_first_image=True),
    MemoryCase("2B, blocks streamed, 512x320x25", "--size 512x320 --frames 25 --offload blocks", FILE_2B),
    MemoryCase("2B int8 512x320x25", "--size 512x320 --frames 25 --quant int8", FILE_2B),
    MemoryCase("13B Q4_K 256x256x9", "--size 256x256 --frames 9", GGUF_13B, vae=FILE_13B),
    MemoryCase(
        "13B Q4_K, blocks streamed, 256x256x9", "--size 256x256 --frames 9 --offload blocks", GGUF_13B, vae=FILE_13B
    ),
)


def cli_arguments(case: MemoryCase, models_folder: Path, scratch: Path) -> list[str]:
    """Returns the arguments of `kadr plan` and `kadr generate`."""
    arguments = [PROMPT, *case.flags.split()]
    if case.model is not None:
        arguments += ["--model", str(models_folder / case.model), *TWO_STEP_FLAGS, "--text-encoder", str(models_folder)]
    if case.vae is not None:
        arguments += ["--vae", str(models_folder / case.vae)]
    if case.has_first_image:
        Image.linear_gradient("L").convert("RGB").save(scratch / "first.png")
        arguments += ["--image", str(scratch / "first.png"), "0"]
    return arguments


def predict(case: MemoryCase, models_folder: Path) -> dict[str, float]:
    """Returns the JSON of `kadr plan`, in a new process with an empty prompt cache."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "kadr", "plan", *cli_arguments(case, models_folder, Path(name)), "--json"]
        environment = {**os.environ, "KADR_CACHE": name}
        process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    plan: dict[str, float] = json.loads(process.stdout)
    return plan


def measure(case: MemoryCase, models_folder: Path) -> list[float]:
    """Returns the peak bytes and the seconds of `kadr generate` in a new process."""
    with tempfile.TemporaryDirectory() as name:
        arguments = [*cli_arguments(case, models_folder, Path(name)), "--output", str(Path(name) / "out.mp4")]
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "kadr", "generate", *arguments],
            env={**os.environ, "KADR_CACHE": name},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{case.name}: kadr generate ended with {os.waitstatus_to_exitcode(status)}")
        return [usage.ru_maxrss * 1024, time.monotonic() - start]


def table_row(case: MemoryCase, plan: dict[str, float], measurement: Sequence[float]) -> list[str]:
    peak, seconds = measurement
    gigabytes = [f"{size / 1e9:.2f} GB" for size in (plan["peak_bytes"], peak)]
    ratio = f"{plan['peak_bytes'] / peak:.3f}"
    return [case.name, *gigabytes, ratio, f"{plan['seconds']:.0f} s", f"{seconds:.0f} s"]


def table(rows: Sequence[Sequence[str]]) -> str:
    head = ("case", "predicted peak", "measured peak", "predicted / measured", "predicted time", "measured time")
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plan-only", action="store_true", help="reuse the measurements of the last run")
    args = parser.parse_args()
    results_file = args.folder / "measured.json"
    measurements = json.loads(results_file.read_text()) if args.plan_only else {}
    rows = []
    for case in CASES:
        if case.model is not None and not (args.folder / case.model).exists():
            continue
        if not args.plan_only:
            measurements[case.name] = measure(case, args.folder)
            results_file.write_text(json.dumps(measurements, indent=1))
        if case.name in measurements:
            rows.append(table_row(case, predict(case, args.folder), measurements[case.name]))
            print(*rows[-1], sep="  ", flush=True)
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
