"""The demo model in fewer bits: its videos stay what they were."""

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
def right() -> list[Video]:
    engine = Engine.open("demo", device="cpu", dtype="float32")
    return [engine.generate(request) for request in REQUESTS]


def from_file(kind: str, folder: Path) -> Engine:
    path = folder / f"{kind}.gguf"
    quantize(str(DEMO), path, kind)
    return Engine.open(path, vae=DEMO, text_encoder=DEMO.parent, device="cpu", dtype="float32")


WAYS: dict[str, tuple[Callable[[Path], Engine], float]] = {
    "int8": (lambda folder: Engine.open("demo", quant="int8", device="cpu", dtype="float32"), 35.0),
    "a Q8_0 file": (lambda folder: from_file("Q8_0", folder), 35.0),
    "a Q4_K file": (lambda folder: from_file("Q4_K", folder), 27.0),
}


@pytest.mark.parametrize("way", WAYS)
def test_videos_of_the_demo_keep_their_pixels(way: str, right: list[Video], tmp_path: Path) -> None:
    opened, bar = WAYS[way]
    engine = opened(tmp_path)
    made = [psnr(engine.generate(video.request).frames, video.frames) for video in right]
    assert bar <= np.mean(made) < 80  # and it is not the same


def as_fp8(path: Path, *, turned: int | None) -> Path:
    """The demo with the matrices of its blocks in plain 8-bit floats, turned or not."""
    tensors = load_file(DEMO)
    for name, tensor in tensors.items():
        if name.startswith(f"{PREFIX}transformer_blocks.") and tensor.ndim == 2 and name.endswith(".weight"):
            weight = tensor.float() if turned is None else hadamard_transform(tensor.float(), turned)
            tensors[name] = weight.to(torch.float8_e4m3fn)
    save_file(tensors, path, dict(Source.open(DEMO).metadata))
    return path


def test_turned_fp8_weights_are_recognised_by_what_they_do_and_turned_back(right: list[Video], tmp_path: Path) -> None:
    plain = Engine.open(as_fp8(tmp_path / "plain.safetensors", turned=None), text_encoder=DEMO.parent, device="cpu")
    turned = Engine.open(as_fp8(tmp_path / "turned.safetensors", turned=64), text_encoder=DEMO.parent, device="cpu")
    video = right[0]
    as_plain = psnr(plain.generate(video.request).frames, video.frames)
    with pytest.warns(KadrWarning, match=r"turned\.safetensors holds weights that were turned .* 64 columns"):
        made = turned.generate(video.request)
    assert psnr(made.frames, video.frames) > as_plain - 6 > 15


def test_fp8_weights_that_do_nothing_sensible_are_refused(tmp_path: Path) -> None:
    path = as_fp8(tmp_path / "noise.safetensors", turned=None)
    tensors, metadata = load_file(path), dict(Source.open(path).metadata)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            drawn = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * 3
            tensors[name] = drawn.to(torch.float8_e4m3fn)
    save_file(tensors, path, metadata)
    engine = Engine.open(path, text_encoder=DEMO.parent, device="cpu")
    with pytest.raises(CheckpointError, match=r"does not answer noise as a trained model does .*its pictures would be"):
        engine.generate(REQUESTS[0])
