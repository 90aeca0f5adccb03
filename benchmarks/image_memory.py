"""Measures the peak memory of `kadr generate --image` beside the plan's: `python -m benchmarks.image_memory`.

Writes a table and a figure into docs/reference/memory.md. Each case runs in its own process, as in
`benchmarks.plan_accuracy`: a video of the demo model with one photograph of 2 to 169 megapixels as its first frame.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

matplotlib.use("svg")

from matplotlib import pyplot

from benchmarks.plan_accuracy import PROMPT, measure, predict
from kadr.bench.machine import describe_machine
from kadr.bench.text_report import machine_line
from tests import doc_tables

PAGE, MARK = doc_tables.DOCS / "reference" / "memory.md", "python -m benchmarks.image_memory"
FIGURE = doc_tables.DOCS / "images" / "image-memory.svg"
COLUMNS = ("image", "megapixels", "planned peak", "measured peak", "ratio", "a pixel")
# width, height, suffix
PHOTOGRAPHS = (
    (1632, 1224, "jpg"),
    (4032, 3024, "jpg"),
    (4032, 3024, "png"),
    (6000, 4000, "jpg"),
    (8064, 6048, "jpg"),
    (13000, 13000, "jpg"),
    (13000, 13000, "png"),
)


@dataclass(frozen=True)
class Measured:
    """Peaks in bytes of one photograph's video. without_image: measured peak of the same video without it."""

    width: int
    height: int
    suffix: str
    planned: int
    measured: int
    without_image: int

    @property
    def megapixels(self) -> float:
        return self.width * self.height / 1e6

    def row(self) -> list[str]:
        """Returns the cells of the table."""
        bytes_per_pixel = max(0, self.measured - self.without_image) / (self.width * self.height)
        return [
            f"{self.width}x{self.height} {self.suffix.upper()}",
            f"{self.megapixels:.0f}",
            *(f"{size / 1e6:.0f} MB" for size in (self.planned, self.measured)),
            f"{self.planned / self.measured:.2f}",
            f"{bytes_per_pixel:.0f} bytes",
        ]


def write_photograph(path: Path, width: int, height: int) -> None:
    """Writes an image with gradients at every place, as large as a photograph of that size."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    settings = {"quality": 90} if path.suffix == ".jpg" else {"compress_level": 1}
    Image.fromarray(noise).resize((width, height)).save(path, **settings)


def measure_photographs(scratch: Path) -> list[Measured]:
    """Plans and makes a video of each photograph, in new processes."""
    cache, flags = scratch / "cache", [PROMPT, "--size", "128x128", "--frames", "9", "--no-prompt-cache"]
    without_image = measure(flags, cache, scratch)[0]
    results = []
    for width, height, suffix in PHOTOGRAPHS:
        path = scratch / f"photograph.{suffix}"
        write_photograph(path, width, height)
        arguments = [*flags, "--image", str(path)]
        plan = predict(arguments, cache, calibrate=False)
        peak = measure(arguments, cache, scratch)[0]
        results.append(Measured(width, height, suffix, plan["peak_bytes"], peak, without_image))
        print(*results[-1].row(), sep="  ", flush=True)
    return results


def draw(results: Sequence[Measured], path: Path) -> None:
    """Writes an SVG: planned and measured peaks of JPEG files over megapixels. The same figures give the same bytes."""
    matplotlib.rcParams["svg.hashsalt"] = "kadr"
    figure, panel = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    photographs = [result for result in results if result.suffix == "jpg"]
    megapixels = [result.megapixels for result in photographs]
    panel.plot(megapixels, [result.measured / 1e6 for result in photographs], "o-", color="#1f6f8b", label="measured")
    panel.plot(megapixels, [result.planned / 1e6 for result in photographs], "s:", color="#d1603d", label="planned")
    panel.set(xlabel="megapixels of the image", ylabel="peak in MB", ylim=(0, None))
    panel.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    argparse.ArgumentParser(prog=MARK, description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as name:
        results = measure_photographs(Path(name))
    draw(results, FIGURE)
    machine = machine_line(describe_machine(torch.device("cpu")))
    table = doc_tables.markdown_table(COLUMNS, [result.row() for result in results])
    doc_tables.write_table(PAGE, MARK, f"\n{machine}.\n\n{table}\n")


if __name__ == "__main__":
    main()
