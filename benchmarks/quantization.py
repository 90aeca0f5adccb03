"""What storing weights in fewer bits costs: `python -m benchmarks.quantization`. Writes docs/reference/quantization.md.

Two measures. The error of a weight itself, on the demo transformer's own weights and on drawn ones with heavy tails, as
large trained matrices have. And the demo's videos: the same prompts and seeds as in float32, latents and decoded frames
compared. Types of GGUF go through a file that `kadr quantize` wrote, as a user's would.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import kadr
from kadr import Engine, Request
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.save import write_single_file
from kadr.cli.commands.quantize import quantize
from kadr.kernels import int8
from kadr.kernels.dequant import dequantize
from kadr.kernels.ggml_types import GGML_TYPES
from kadr.quant.convert import ggml_type_for, linears_in_blocks, quantize_rows_fp8
from kadr.quant.ggml import quantize as pack
from kadr.quant.weight_formats import BITS_PER_WEIGHT, EIGHT_BIT_FORMATS, FP8, FP8_WEIGHT_ONLY, INT8, INT8_WEIGHT_ONLY
from train.evaluate import prompt_adherence
from train.scenes import held_out_captions

DEMO = Path(kadr.__file__).parent / "assets" / "demo" / "demo.safetensors"
PAGE = Path(__file__).parents[1] / "docs" / "reference" / "quantization.md"
MIXES = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q2_K")
LEGACY_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
LOAD_SCHEMES = (INT8, INT8_WEIGHT_ONLY, FP8_WEIGHT_ONLY)
# Rows of 192 numbers fill no block of 256, so a file of the demo has other types there; pure ones are filled up.
PADDED_TYPES = ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SEED, VIDEOS, CAPTIONS = 77, 8, 60


@dataclass(frozen=True)
class VideoErrors:
    """The mean and the least over videos, in dB."""

    latents_psnr: float
    frames_psnr: float
    min_frames_psnr: float


def quantize_dequantize(name: str, weight: Tensor) -> Tensor:
    """The weight as it comes back from being stored."""
    if name in EIGHT_BIT_FORMATS:
        numbers, scale = (quantize_rows_fp8 if name in (FP8, FP8_WEIGHT_ONLY) else int8.quantize_rows)(weight)
        return numbers.float() * scale
    packing = ggml_type_for(name, weight.shape[1])
    return dequantize(pack(weight, packing), packing, torch.empty(weight.shape))


def weight_error(name: str, weight: Tensor) -> float:
    """Root mean square, relative to the weight's."""
    return float((quantize_dequantize(name, weight) - weight).norm() / weight.norm())


def heavy_tailed_weights() -> Tensor:
    """(512, 4096) drawn from Student's t with five degrees of freedom, some columns ten times the others."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(512, 4096, generator=generator)
    tails = torch.randn(5, 512, 4096, generator=generator).square().mean(0).sqrt()
    columns = torch.where(torch.rand(4096, generator=generator) < 0.002, 10.0, 1.0)
    return 0.02 * normal / tails * columns


def demo_weights() -> list[Tensor]:
    """The matrices of the demo transformer's blocks whose rows every packing can hold."""
    transformer = Checkpoint.open(DEMO).load_transformer(torch.float32)
    return [linear.weight for _, linear in linears_in_blocks(transformer) if linear.weight.shape[1] % 256 == 0]


def psnr(a: Tensor, b: Tensor, peak: float) -> float:
    return float(10 * torch.log10(peak**2 / (a.double() - b.double()).square().mean().clamp(min=1e-20)))


def compare_videos(engine: Engine, reference_videos: Sequence[kadr.Video]) -> VideoErrors:
    """The videos of an engine against those of another, asked for alike: a file does not know the demo's recipe."""
    latents, frames = [], []
    for video in reference_videos:
        made = engine.generate(video.request)
        span = float(video.latents.max() - video.latents.min())
        latents.append(psnr(made.latents, video.latents, span))
        frames.append(psnr(torch.from_numpy(made.frames), torch.from_numpy(video.frames), 255.0))
    return VideoErrors(float(np.mean(latents)), float(np.mean(frames)), min(frames))


def engine_factories(folder: Path) -> dict[str, Callable[[], Engine]]:
    """Each way to store the demo's weights."""

    def from_file(kind: str) -> Callable[[], Engine]:
        def made() -> Engine:
            path = folder / f"demo-{kind}.gguf"
            quantize(str(DEMO), path, kind)
            return Engine.open(path, vae=DEMO, text_encoder=DEMO.parent, dtype="float32", device="cpu")

        return made

    def at_load(scheme: str) -> Callable[[], Engine]:
        return lambda: Engine.open("demo", quant=scheme, dtype="float32", device="cpu")

    made: dict[str, Callable[[], Engine]] = {"bfloat16": lambda: Engine.open("demo", dtype="bfloat16", device="cpu")}
    made |= {scheme: at_load(scheme) for scheme in LOAD_SCHEMES}
    return made | {kind: from_file(kind) for kind in (*LEGACY_TYPES, *MIXES)}


def open_padded(name: str, folder: Path) -> Engine:
    """The demo with weights that went through a packing whose blocks its rows do not fill, filled up with zeros."""
    checkpoint = Checkpoint.open(DEMO)
    transformer = checkpoint.load_transformer(torch.float32)
    for _, linear in linears_in_blocks(transformer):
        columns = linear.weight.shape[1]
        wide = torch.nn.functional.pad(linear.weight, (0, -columns % GGML_TYPES[name].block_size))
        linear.weight = torch.nn.Parameter(
            quantize_dequantize(name, wide)[:, :columns].contiguous(), requires_grad=False
        )
    path = folder / f"demo-{name}-padded.safetensors"
    write_single_file(path, transformer=transformer, schedule=checkpoint.info.schedule, dtype=torch.float32)
    return Engine.open(path, vae=DEMO, text_encoder=DEMO.parent, dtype="float32", device="cpu")


def weight_rows() -> list[list[str]]:
    own, drawn = demo_weights(), heavy_tailed_weights()
    rows = []
    for name in (*LOAD_SCHEMES[:1], FP8_WEIGHT_ONLY, *GGML_TYPES):
        errors = [weight_error(name, weight) for weight in own]
        bits = f"{BITS_PER_WEIGHT[name]:g}"
        rows.append([name, bits, f"{100 * np.mean(errors):.2f} %", f"{100 * weight_error(name, drawn):.2f} %"])
    return rows


def video_rows(folder: Path, videos: int, captions: int) -> list[list[str]]:
    told = held_out_captions(videos, SEED)
    requests = [Request(prompt=caption, seed=seed) for seed, (caption, _) in enumerate(told)]
    plain = Engine.open("demo", dtype="float32", device="cpu")
    right = [plain.generate(request) for request in requests]
    made = engine_factories(folder) | {f"{name}, pure": partial(open_padded, name, folder) for name in PADDED_TYPES}
    rows = []
    for name, opened in made.items():
        engine = opened()
        figures = compare_videos(engine, right)
        row = [
            name,
            f"{figures.latents_psnr:.1f} dB",
            f"{figures.frames_psnr:.1f} dB",
            f"{figures.min_frames_psnr:.1f} dB",
        ]
        rows.append(
            [*row, format_adherence(engine, right[0].request, captions) if captions and name in (INT8, "Q8_0") else ""]
        )
        print(*rows[-1], sep="  ", flush=True)
    return rows


def format_adherence(engine: Engine, reference_request: Request, captions: int) -> str:
    """How often its videos show what unseen captions say. like: a request whose settings they are made with."""
    settings = {
        field.name: getattr(reference_request, field.name)
        for field in fields(reference_request)
        if field.name not in ("prompt", "seed")
    }
    shares = prompt_adherence(engine, held_out_captions(captions, 2026), **settings)
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__)
    parser.add_argument("--videos", type=int, default=VIDEOS)
    parser.add_argument("--captions", type=int, default=CAPTIONS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        weights = markdown_table(("stored as", "bits", "demo's weights", "heavy tails"), weight_rows())
        print(weights, flush=True)
        rows = video_rows(Path(folder), asked.videos, asked.captions)
    videos = markdown_table(("stored as", "latents", "frames", "worst video", "shows what captions say"), rows)
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{weights}\n\n{videos}\n\n{END}{after}", "utf-8")
    print(videos)


if __name__ == "__main__":
    main()
