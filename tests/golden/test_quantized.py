"""Quantized demo models: their videos stay close to those of float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import kadr
from kadr import Engine, Request, Video
from kadr.checkpoints.source import Source
from kadr.cli.commands.quantize import quantize
from kadr.errors import CheckpointError, KadrWarning
from kadr.kernels.hadamard import hadamard_transform
from train.evaluate import psnr
from train.scenes import held_out_captions

DEMO = Path(kadr.__file__).parent / "assets" / "demo" / "demo.safetensors"
REQUESTS = [Request(prompt=caption, seed=seed) for seed, (caption, _) in enumerate(held_out_captions(2, 77))]
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def float32_videos() -> list[Video]:
    engine = Engine.open("demo", device="cpu", dtype="float32")
    return [engine.generate(request) for request in REQUESTS]


def open_gguf(kind: str, folder: Path) -> Engine:
    path = folder / f"{kind}.gguf"
    quantize(str(DEMO), path, kind)
    return Engine.open(path, vae=DEMO, text_encoder=DEMO.parent, device="cpu", dtype="float32")


# How to open the model, and the lowest mean PSNR of its videos in dB.
VARIANTS: dict[str, tuple[Callable[[Path], Engine], float]] = {
    "int8": (lambda folder: Engine.open("demo", quant="int8", device="cpu", dtype="float32"), 35.0),
    "a Q8_0 file": (lambda folder: open_gguf("Q8_0", folder), 35.0),
    "a Q4_K file": (lambda folder: open_gguf("Q4_K", folder), 27.0),
}


@pytest.mark.filterwarnings("ignore:this CPU has no instructions for int8")  # int8-weights stands in for it there
@pytest.mark.parametrize("variant", VARIANTS)
def test_quantized_videos_keep_their_pixels(variant: str, float32_videos: list[Video], tmp_path: Path) -> None:
    open_engine, bound = VARIANTS[variant]
    engine = open_engine(tmp_path)
    scores = [psnr(engine.generate(video.request).frames, video.frames) for video in float32_videos]
    assert bound <= np.mean(scores) < 80  # and it is not the same


def write_fp8(path: Path, *, rotation_size: int | None) -> Path:
    """Writes the demo with the matrices of its blocks in fp8 without scales, Hadamard-rotated or not."""
    tensors = load_file(DEMO)
    for name, tensor in tensors.items():
        if name.startswith(f"{PREFIX}transformer_blocks.") and tensor.ndim == 2 and name.endswith(".weight"):
            weight = tensor.float()
            if rotation_size is not None:
                weight = hadamard_transform(weight, rotation_size)
            tensors[name] = weight.to(torch.float8_e4m3fn)
    save_file(tensors, path, dict(Source.open(DEMO).metadata))
    return path


def test_rotated_fp8_weights_are_detected_and_rotated_back(float32_videos: list[Video], tmp_path: Path) -> None:
    plain_path = write_fp8(tmp_path / "plain.safetensors", rotation_size=None)
    rotated_path = write_fp8(tmp_path / "rotated.safetensors", rotation_size=64)
    plain = Engine.open(plain_path, text_encoder=DEMO.parent, device="cpu")
    rotated = Engine.open(rotated_path, text_encoder=DEMO.parent, device="cpu")
    video = float32_videos[0]
    plain_psnr = psnr(plain.generate(video.request).frames, video.frames)
    with pytest.warns(KadrWarning, match=r"rotated\.safetensors has Hadamard-rotated weights, .* 64 columns"):
        rotated_video = rotated.generate(video.request)
    assert psnr(rotated_video.frames, video.frames) > plain_psnr - 6 > 15


def test_nonsensical_fp8_weights_are_refused(tmp_path: Path) -> None:
    path = write_fp8(tmp_path / "noise.safetensors", rotation_size=None)
    tensors, metadata = load_file(path), dict(Source.open(path).metadata)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * 3
            tensors[name] = noise.to(torch.float8_e4m3fn)
    save_file(tensors, path, metadata)
    engine = Engine.open(path, text_encoder=DEMO.parent, device="cpu")
    with pytest.raises(CheckpointError, match=r"does not correlate with the noise, .*its videos would be"):
        engine.generate(REQUESTS[0])
