"""Compares predicted and measured memory of LoRA training: `python -m benchmarks.training_memory FOLDER`.

Each case trains for a step with `kadr train-lora` in its own process, and the operating system reports the peak. FOLDER
has the random model of `python -m benchmarks.full_size FOLDER`. Writes the table of docs/guides/train-lora.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kadr import Engine, Size
from kadr.media.writer import VideoWriter
from kadr.memory.device import resident_bytes
from kadr.planning.planner import STARTUP_BYTES
from kadr.training.dataset import Example
from kadr.training.memory_check import required_bytes
from kadr.training.settings import TrainingSettings
from tests import doc_tables

PAGE, NAME = doc_tables.DOCS / "guides" / "train-lora.md", "python -m benchmarks.training_memory"
FILE_2B = "random-2b-0.9.8-distilled.safetensors"


@dataclass(frozen=True)
class TrainingCase:
    """A training to run. model: file name in the folder; None is the demo."""

    name: str
    size: Size
    frames: int
    quant: str
    rank: int = 32
    model: str | None = None
    gradient_checkpointing: bool = False  # blocks are computed twice


CASES = (
    TrainingCase("demo, 128x128, 25 frames", Size(128, 128), 25, "none"),
    TrainingCase("demo, 512x512, 97 frames", Size(512, 512), 97, "none"),
    TrainingCase("2B in 8 bits, 512x320, 9 frames", Size(512, 320), 9, "int8", model=FILE_2B),
    TrainingCase("2B in 8 bits, 512x320, 25 frames", Size(512, 320), 25, "int8", model=FILE_2B),
    TrainingCase("2B in 4 bits, 512x320, 25 frames", Size(512, 320), 25, "Q4_K", model=FILE_2B),
    TrainingCase(
        "2B in 8 bits, 704x480, 49 frames, gradient checkpointing",
        Size(704, 480),
        49,
        "int8",
        model=FILE_2B,
        gradient_checkpointing=True,
    ),
)


def write_clip_folder(folder: Path, case: TrainingCase) -> Path:
    """Writes a folder with one clip of noise and its caption."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (case.size.height, case.size.width, 3), dtype=np.uint8)
    with VideoWriter(folder / "clip.mp4", case.size, 24) as writer:
        writer.write(np.stack([np.roll(noise, 4 * frame, axis=1) for frame in range(case.frames)]))
    (folder / "clip.txt").write_text("a red circle moving right\n", "utf-8")
    return folder


def predict(case: TrainingCase, models_folder: Path) -> int:
    """Returns the predicted bytes, with those of the process before training."""
    base = resident_bytes() + STARTUP_BYTES
    options = {} if case.quant == "none" else {"quant": case.quant}
    engine = Engine.open("demo" if case.model is None else models_folder / case.model, device="cpu", **options)
    settings = TrainingSettings(size=case.size, frames=case.frames, rank=case.rank)
    example = Example(Path("clip.mp4"), "", case.frames, None)
    return base + required_bytes(engine, settings, [example], gradient_checkpointing=case.gradient_checkpointing).total


def measure(case: TrainingCase, models_folder: Path) -> tuple[int, float]:
    """Returns the peak bytes and the seconds."""
    with tempfile.TemporaryDirectory() as name:
        clips = write_clip_folder(Path(name) / "clips", case)
        arguments = ["--size", str(case.size), "--frames", str(case.frames), "--rank", str(case.rank), "--steps", "1"]
        arguments += ["--output", str(Path(name) / "lora.safetensors"), "--quant", case.quant, "--device", "cpu"]
        arguments += [] if case.model is None else ["--model", str(models_folder / case.model)]
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "kadr", "train-lora", str(clips), *arguments], stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{case.name}: kadr train-lora ended with {os.waitstatus_to_exitcode(status)}")
        return usage.ru_maxrss * 1024, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_memory", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", metavar="WORDS", default="", help="run the cases whose names contain WORDS")
    parser.add_argument("--table-only", action="store_true", help="reuse the measurements of earlier runs")
    args = parser.parse_args()
    results_file = args.folder / "trained.json"
    measurements = json.loads(results_file.read_text()) if results_file.exists() else {}
    for case in CASES:
        if args.only in case.name and not args.table_only:
            measurements[case.name] = measure(case, args.folder)
            results_file.write_text(json.dumps(measurements, indent=1))
            print(case.name, measurements[case.name], flush=True)
    rows = []
    for case in CASES:
        if case.name in measurements:
            predicted, peak = predict(case, args.folder), measurements[case.name][0]
            rows.append((case.name, f"{predicted / 1e9:.2f} GB", f"{peak / 1e9:.2f} GB", f"{predicted / peak:.2f}"))
            print(*rows[-1], sep="  ")
    doc_tables.write_table(
        PAGE, NAME, doc_tables.markdown_table(("one clip, rank 32", "predicted", "measured", "ratio"), rows)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
