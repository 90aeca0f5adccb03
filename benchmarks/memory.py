"""The plan against what happens: `python -m benchmarks.memory FOLDER`. Writes the table of docs/reference/memory.md.

Each case runs in a process of its own: `kadr plan` says what it will take, `kadr generate` takes it, and the operating
system says how much that was at most (the largest resident set, pages of mapped files and all). FOLDER holds the random
models of `python -m benchmarks.full_size FOLDER`, and of 13B the file that `kadr quantize` made of it.
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
    """A video to make.

    Args:
        model: a file in the folder; None is the demo.
        vae: as `model`; None is the model's own.
        has_first_image: give it a first frame.
    """

    name: str
    flags: str
    model: str | None = None
    vae: str | None = None
    has_first_image: bool = False


CASES = (
    MemoryCase("demo 128x128x25", ""),
    MemoryCase("demo 256x256x49", "--size 256x256 --frames 49 --steps 4"),
    MemoryCase("demo 128x128x25, first frame given", "--steps 4", has_first_image=True),
    MemoryCase("demo distilled, two passes to 256x256", "--model demo-distilled"),
    MemoryCase("demo 512x512x97, int8", "--size 512x512 --frames 97 --steps 2 --quant int8"),
    MemoryCase("2B bf16 256x256x9", "--size 256x256 --frames 9", FILE_2B),
    MemoryCase("2B bf16 512x320x25", "--size 512x320 --frames 25", FILE_2B),
    MemoryCase("2B bf16 512x320x121", "--size 512x320 --frames 121", FILE_2B),
    MemoryCase("2B bf16 704x480x25, first frame given", "--size 704x480 --frames 25", FILE_2B, has_first_image=True),
    MemoryCase("2B, blocks streamed, 512x320x25", "--size 512x320 --frames 25 --offload blocks", FILE_2B),
    MemoryCase("2B int8 512x320x25", "--size 512x320 --frames 25 --quant int8", FILE_2B),
    MemoryCase("13B Q4_K 256x256x9", "--size 256x256 --frames 9", GGUF_13B, vae=FILE_13B),
    MemoryCase(
        "13B Q4_K, blocks streamed, 256x256x9", "--size 256x256 --frames 9 --offload blocks", GGUF_13B, vae=FILE_13B
    ),
)


def cli_arguments(case: MemoryCase, models_folder: Path, scratch: Path) -> list[str]:
    """What `kadr plan` and `kadr generate` are given."""
    made = [PROMPT, *case.flags.split()]
    if case.model is not None:
        made += ["--model", str(models_folder / case.model), *TWO_STEP_FLAGS, "--text-encoder", str(models_folder)]
    if case.vae is not None:
        made += ["--vae", str(models_folder / case.vae)]
    if case.has_first_image:
        Image.linear_gradient("L").convert("RGB").save(scratch / "picture.png")
        made += ["--image", str(scratch / "picture.png"), "0"]
    return made


def predict(case: MemoryCase, models_folder: Path) -> dict[str, float]:
    """What `kadr plan` says, in a fresh process that remembers no prompt."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "kadr", "plan", *cli_arguments(case, models_folder, Path(name)), "--json"]
        environment = {**os.environ, "KADR_CACHE": name}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    told: dict[str, float] = json.loads(done.stdout)
    return told


def measure(case: MemoryCase, models_folder: Path) -> list[float]:
    """Bytes at the peak and seconds, of `kadr generate` in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        given = [*cli_arguments(case, models_folder, Path(name)), "--output", str(Path(name) / "out.mp4")]
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "kadr", "generate", *given],
            env={**os.environ, "KADR_CACHE": name},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{case.name}: kadr generate ended with {os.waitstatus_to_exitcode(status)}")
        return [usage.ru_maxrss * 1024, time.monotonic() - began]


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
    parser.add_argument("--plan-only", action="store_true", help="measured figures are those of the last run")
    asked = parser.parse_args()
    kept = asked.folder / "measured.json"
    known = json.loads(kept.read_text()) if asked.plan_only else {}
    rows = []
    for case in CASES:
        if case.model is not None and not (asked.folder / case.model).exists():
            continue
        if not asked.plan_only:
            known[case.name] = measure(case, asked.folder)
            kept.write_text(json.dumps(known, indent=1))
        if case.name in known:
            rows.append(table_row(case, predict(case, asked.folder), known[case.name]))
            print(*rows[-1], sep="  ", flush=True)
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
