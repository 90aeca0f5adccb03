"""Cost of quantized weights: `python -m benchmarks.quantization`. Writes docs/reference/quantization.md.

Two measures: the error of a weight itself, on the demo transformer's weights and on random ones with heavy tails, as
large trained matrices have; and latents and decoded frames of the demo's videos against those in float32, for the same
prompts and seeds. GGUF types go through a file that `kadr quantize` writes, as a user's would.
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
from kadr.quant.ggml import quantize as quantize_to_ggml
from kadr.quant.weight_formats import BITS_PER_WEIGHT, EIGHT_BIT_FORMATS, FP8, FP8_WEIGHT_ONLY, INT8, INT8_WEIGHT_ONLY
from train.evaluate import prompt_adherence
from train.scenes import held_out_captions

DEMO = Path(kadr.__file__).parent / "assets" / "demo" / "demo.safetensors"
PAGE = Path(__file__).parents[1] / "docs" / "reference" / "quantization.md"
MIXES = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q2_K")
LEGACY_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
LOAD_FORMATS = (INT8, INT8_WEIGHT_ONLY, FP8_WEIGHT_ONLY)
# Rows of 192 elements do not fill blocks of 256, so a file of the demo falls back to other types; pure ones are padded.
PADDED_TYPES = ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SEED, VIDEOS, CAPTIONS = 77, 8, 60


@dataclass(frozen=True)
class VideoErrors:
    """Mean and minimum over videos, in dB."""

    latents_psnr: float
    frames_psnr: float
    min_frames_psnr: float


def quantize_dequantize(name: str, weight: Tensor) -> Tensor:
    """Returns the weight after quantizing and dequantizing."""
    if name in EIGHT_BIT_FORMATS:
        codes, scale = (quantize_rows_fp8 if name in (FP8, FP8_WEIGHT_ONLY) else int8.quantize_rows)(weight)
        return codes.float() * scale
    ggml_type = ggml_type_for(name, weight.shape[1])
    return dequantize(quantize_to_ggml(weight, ggml_type), ggml_type, torch.empty(weight.shape))


def weight_error(name: str, weight: Tensor) -> float:
    """Returns the root mean square of the error, relative to the weight's."""
    return float((quantize_dequantize(name, weight) - weight).norm() / weight.norm())


def heavy_tailed_weights() -> Tensor:
    """Returns (512, 4096) from Student's t with five degrees of freedom, some columns ten times the others."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(512, 4096, generator=generator)
    tails = torch.randn(5, 512, 4096, generator=generator).square().mean(0).sqrt()
    columns = torch.where(torch.rand(4096, generator=generator) < 0.002, 10.0, 1.0)
    return 0.02 * normal / tails * columns


def demo_weights() -> list[Tensor]:
    """Returns the matrices of the demo transformer's blocks whose rows divide into every GGML type's blocks."""
    transformer = Checkpoint.open(DEMO).load_transformer(torch.float32)
    return [linear.weight for _, linear in linears_in_blocks(transformer) if linear.weight.shape[1] % 256 == 0]


def psnr(a: Tensor, b: Tensor, peak: float) -> float:
    return float(10 * torch.log10(peak**2 / (a.double() - b.double()).square().mean().clamp(min=1e-20)))


def compare_videos(engine: Engine, reference_videos: Sequence[kadr.Video]) -> VideoErrors:
    """Compares an engine's videos with reference ones of the same requests: a file does not know the demo's recipe."""
    latents, frames = [], []
    for video in reference_videos:
        quantized = engine.generate(video.request)
        span = float(video.latents.max() - video.latents.min())
        latents.append(psnr(quantized.latents, video.latents, span))
        frames.append(psnr(torch.from_numpy(quantized.frames), torch.from_numpy(video.frames), 255.0))
    return VideoErrors(float(np.mean(latents)), float(np.mean(frames)), min(frames))


def engine_factories(folder: Path) -> dict[str, Callable[[], Engine]]:
    """Returns a factory of the demo's engine for each weight format."""

    def from_file(type_name: str) -> Callable[[], Engine]:
        def open_file() -> Engine:
            path = folder / f"demo-{type_name}.gguf"
            quantize(str(DEMO), path, type_name)
            return Engine.open(path, vae=DEMO, text_encoder=DEMO.parent, dtype="float32", device="cpu")

        return open_file

    def at_load(weight_format: str) -> Callable[[], Engine]:
        return lambda: Engine.open("demo", quant=weight_format, dtype="float32", device="cpu")

    factories: dict[str, Callable[[], Engine]] = {
        "bfloat16": lambda: Engine.open("demo", dtype="bfloat16", device="cpu")
    }
    factories |= {weight_format: at_load(weight_format) for weight_format in LOAD_FORMATS}
    return factories | {type_name: from_file(type_name) for type_name in (*LEGACY_TYPES, *MIXES)}


def open_padded(name: str, folder: Path) -> Engine:
    """Opens the demo with weights quantized to a type whose blocks its rows do not fill, padded with zeros."""
    checkpoint = Checkpoint.open(DEMO)
    transformer = checkpoint.load_transformer(torch.float32)
    for _, linear in linears_in_blocks(transformer):
        columns = linear.weight.shape[1]
        padded = torch.nn.functional.pad(linear.weight, (0, -columns % GGML_TYPES[name].block_size))
        linear.weight = torch.nn.Parameter(
            quantize_dequantize(name, padded)[:, :columns].contiguous(), requires_grad=False
        )
    path = folder / f"demo-{name}-padded.safetensors"
    write_single_file(path, transformer=transformer, schedule=checkpoint.info.schedule, dtype=torch.float32)
    return Engine.open(path, vae=DEMO, text_encoder=DEMO.parent, dtype="float32", device="cpu")


def weight_rows() -> list[list[str]]:
    demo, heavy_tailed = demo_weights(), heavy_tailed_weights()
    rows = []
    for name in (*LOAD_FORMATS[:1], FP8_WEIGHT_ONLY, *GGML_TYPES):
        errors = [weight_error(name, weight) for weight in demo]
        bits = f"{BITS_PER_WEIGHT[name]:g}"
        rows.append([name, bits, f"{100 * np.mean(errors):.2f} %", f"{100 * weight_error(name, heavy_tailed):.2f} %"])
    return rows


def video_rows(folder: Path, videos: int, captions: int) -> list[list[str]]:
    captions_and_scenes = held_out_captions(videos, SEED)
    requests = [Request(prompt=caption, seed=seed) for seed, (caption, _) in enumerate(captions_and_scenes)]
    fp32_engine = Engine.open("demo", dtype="float32", device="cpu")
    reference_videos = [fp32_engine.generate(request) for request in requests]
    factories = engine_factories(folder) | {
        f"{name}, pure": partial(open_padded, name, folder) for name in PADDED_TYPES
    }
    rows = []
    for name, open_engine in factories.items():
        engine = open_engine()
        figures = compare_videos(engine, reference_videos)
        row = [
            name,
            f"{figures.latents_psnr:.1f} dB",
            f"{figures.frames_psnr:.1f} dB",
            f"{figures.min_frames_psnr:.1f} dB",
        ]
        rows.append(
            [
                *row,
                format_adherence(engine, reference_videos[0].request, captions)
                if captions and name in (INT8, "Q8_0")
                else "",
            ]
        )
        print(*rows[-1], sep="  ", flush=True)
    return rows


def format_adherence(engine: Engine, reference_request: Request, captions: int) -> str:
    """Returns how often videos match unseen captions. reference_request: the request whose settings they have."""
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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        weights = markdown_table(("weights", "bits", "error, demo's weights", "error, heavy tails"), weight_rows())
        print(weights, flush=True)
        rows = video_rows(Path(folder), options.videos, options.captions)
    videos = markdown_table(("weights", "latents", "frames", "worst video", "matches captions"), rows)
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{weights}\n\n{videos}\n\n{END}{after}", "utf-8")
    print(videos)


if __name__ == "__main__":
    main()
