"""Measures what costs the same for each byte, weight or pixel: reading, converting, quantizing, writing a video."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kadr.checkpoints.header import FP8_DTYPES
from kadr.errors import MediaError
from kadr.kernels.ggml_types import GGML_TYPES
from kadr.media.postprocess import denormalize, to_uint8
from kadr.media.writer import VideoWriter
from kadr.memory.device import free_bytes
from kadr.memory.mapped_files import map_file, release_pages
from kadr.nn.linear import Linear
from kadr.planning.calibration.calibration import (
    CONVERT,
    MAP,
    NEW_MEMORY,
    PREPACK,
    READ,
    START_UP,
    UPLOAD,
    WRITE,
    dequantize_rate,
    quantize_rate,
)
from kadr.planning.calibration.clock import Clock
from kadr.quant.convert import quantize_blocks
from kadr.quant.layers import GGMLLinear, ScaledLinear, Scratch
from kadr.quant.prepack import prepack_linears, should_prepack_linears
from kadr.quant.weight_formats import FP8, FP8_WEIGHT_ONLY, INT8, INT8_WEIGHT_ONLY
from kadr.shapes import Size

FILE_BYTES = 128_000_000  # of the file that reading is measured with
SIDE = 2048  # of the weight that conversions are measured with
NEW_BYTES = 1 << 30  # that are taken from the system, or a quarter of what is free
QUANTIZED_SIDE = 512  # of the weight that is quantized: some types search for their scales
VIDEO_SIZE, VIDEO_FRAMES = Size(512, 320), 48
STARTUP_ARGUMENTS = ("generate", "a", "--size", "32x32", "--frames", "1", "--steps", "1", "--no-prompt-cache")
STARTUP_RUNS, STARTUP_TIMEOUT = 2, 120  # the faster of so many runs counts; seconds


@dataclass(frozen=True)
class RateMeter:
    """Measures rates for a dtype on a device."""

    dtype: torch.dtype
    device: torch.device

    @property
    def clock(self) -> Clock:
        """The clock of the device."""
        return Clock(self.device)

    def new_memory(self) -> dict[str, float]:
        """Measures memory that the process did not have before: seconds per byte."""
        count = min(NEW_BYTES, free_bytes(torch.device("cpu")) // 4)
        return {NEW_MEMORY: self.clock.once(lambda: torch.ones(count, dtype=torch.uint8)) / count}

    def reading(self) -> dict[str, float]:
        """Measures reading a file from disk, and mapping it from the page cache: seconds per byte."""
        with tempfile.TemporaryDirectory(prefix="kadr-calibration-") as folder:
            path = Path(folder) / "weights"
            path.write_bytes(os.urandom(FILE_BYTES // 16) * 16)
            view = torch.frombuffer(map_file(path), dtype=torch.int64)
            cached = self._touch(view)
            rates = {MAP: cached / FILE_BYTES}
            if (uncached := self._touch_uncached(path, view)) is not None:
                rates[READ] = max(uncached - cached, 0.05 * uncached) / FILE_BYTES
            del view
        return rates

    def _touch(self, view: Tensor) -> float:
        """Returns the seconds of reading a tensor in a mapped file whose pages this process does not have."""
        release_pages([view])
        return self.clock.once(lambda: view.sum())

    def _touch_uncached(self, path: Path, view: Tensor) -> float | None:
        """Returns the seconds of reading it from disk; None where the system cannot drop a file from its cache."""
        if not hasattr(os, "posix_fadvise"):
            return None
        release_pages([view])
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return self.clock.once(lambda: view.sum())

    def conversions(self) -> dict[str, float]:
        """Measures converting, prepacking, dequantizing and moving weights: seconds per weight, or per byte."""
        stored = torch.randn(SIDE, SIDE).to(torch.bfloat16 if self.dtype != torch.bfloat16 else torch.float32)
        rates = {CONVERT: self.clock.fastest(lambda: stored.to(self.dtype)) / stored.numel()}
        if self.device.type == "cuda":
            rates[UPLOAD] = self.clock.fastest(lambda: stored.to(self.device)) / stored.nbytes
        if should_prepack_linears(self.dtype, self.device):
            rates[PREPACK] = self._prepack_seconds() / SIDE**2
        for name, layer in self._dequantizing_layers():
            out = torch.empty(SIDE, SIDE, dtype=self.dtype, device=self.device)
            with suppress(RuntimeError, TypeError):  # a device may lack a storage type
                task = partial(layer.to(self.device).dequantize_into, out)
                rates[dequantize_rate(name)] = self.clock.fastest(task) / SIDE**2
        return rates

    def _prepack_seconds(self) -> float:
        layers = nn.ModuleList([_linear(SIDE, self.dtype)])
        return self.clock.once(lambda: prepack_linears(layers))

    def _dequantizing_layers(self) -> Iterator[tuple[str, GGMLLinear | ScaledLinear]]:
        """Yields layers of every storage type that is dequantized for each use."""
        scratch = Scratch()
        for name, ggml_type in GGML_TYPES.items():
            blocks = torch.randint(0, 60, (SIDE, ggml_type.row_bytes(SIDE)), dtype=torch.uint8)
            yield name, GGMLLinear(blocks, ggml_type, SIDE, None, scratch)
        values, scale = torch.randn(SIDE, SIDE), torch.ones(SIDE, 1)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, *FP8_DTYPES):
            if dtype != self.dtype:
                name = str(dtype).removeprefix("torch.")
                yield name, ScaledLinear(values.to(dtype), scale if dtype in FP8_DTYPES else None, None, scratch)
        yield "int8", ScaledLinear(values.mul(20).to(torch.int8), scale, None, scratch)

    def quantizing(self) -> dict[str, float]:
        """Measures quantizing weights while they are loaded: seconds per weight, by format."""
        rates = {}
        for name in (INT8, INT8_WEIGHT_ONLY, FP8, FP8_WEIGHT_ONLY, *GGML_TYPES):
            module = nn.Module()
            module.blocks = nn.ModuleList([_linear(QUANTIZED_SIDE, self.dtype)])
            with suppress(RuntimeError, TypeError):  # likewise
                task = partial(quantize_blocks, module, name, device=self.device)
                rates[quantize_rate(name)] = self.clock.once(task) / QUANTIZED_SIDE**2
        return rates

    def writing(self) -> dict[str, float]:
        """Measures converting decoded frames to bytes and encoding them into an mp4: seconds per pixel."""
        width, height = VIDEO_SIZE.width, VIDEO_SIZE.height
        time_axis = torch.arange(VIDEO_FRAMES)[:, None, None] / VIDEO_FRAMES
        rows, columns = torch.arange(height)[:, None] / height, torch.arange(width) / width
        moving = torch.sin(6 * (rows + columns + time_axis) + torch.tensor([0.0, 2.0, 4.0])[:, None, None, None])
        pixels = (0.8 * moving + 0.02 * torch.randn(3, VIDEO_FRAMES, height, width)).clamp(-1, 1)
        with tempfile.TemporaryDirectory(prefix="kadr-calibration-") as folder:

            def write() -> None:
                with VideoWriter(Path(folder) / "a.mp4", VIDEO_SIZE, 24) as writer:
                    for chunk in pixels.split(8, dim=1):
                        writer.write(np.asarray(to_uint8(denormalize(chunk))))

            try:
                seconds = self.clock.fastest(write)
            except MediaError:  # no folder for temporary files, say
                return {}
        return {WRITE: seconds / (VIDEO_FRAMES * width * height)}


def measure_startup(device: torch.device) -> dict[str, float]:
    """Measures `kadr generate` from its start to its end, for one small frame of the bundled model; {} if it fails.

    Nearly all of its time is spent on importing, opening files and first uses, which a larger video spends too.
    """
    with (
        suppress(OSError, subprocess.SubprocessError),
        tempfile.TemporaryDirectory(prefix="kadr-calibration-") as folder,
    ):
        output = str(Path(folder) / "a.mp4")
        command = [sys.executable, "-m", "kadr", *STARTUP_ARGUMENTS, "--device", device.type, "--output", output]
        times = []
        for _ in range(STARTUP_RUNS):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, timeout=STARTUP_TIMEOUT)
            times.append(time.perf_counter() - start)
        return {START_UP: min(times)}
    return {}


def _linear(side: int, dtype: torch.dtype) -> Linear:
    layer = Linear(side, side).to(dtype).eval().requires_grad_(False)
    layer.weight.data.normal_(0, side**-0.5)
    return layer
