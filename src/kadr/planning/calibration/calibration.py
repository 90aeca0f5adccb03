"""The speed of a machine as a few curves and rates, from which `planning.timing` computes the seconds of a stage."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import exp, log
from typing import Any, TypeVar

from kadr.quoting import quote

T = TypeVar("T")

# Kernels of a transformer's layers: plain weights, prepacked ones, 8-bit products.
PLAIN, PREPACKED, INT8 = "plain", "prepacked", "int8"
# Kernels of convolutions: plain; Winograd with 4 or 2 frames at a time; Winograd of a still image.
PLAIN_CONV, WINOGRAD_4, WINOGRAD_2, WINOGRAD_IMAGE = "plain", "winograd 4", "winograd 2", "winograd image"
# Rates: seconds for each byte (READ, MAP, UPLOAD, NEW_MEMORY), weight (CONVERT, PREPACK), pixel (WRITE) or run
# (START_UP). NEW_MEMORY is memory that the process did not have before: the system clears it, and a virtual machine
# gets it from its host, which can take longer than to compute what it holds.
READ, MAP, UPLOAD, NEW_MEMORY, CONVERT, PREPACK, WRITE, START_UP = (
    "read",
    "map",
    "upload",
    "new memory",
    "convert",
    "prepack",
    "write",
    "start-up",
)


def dequantize_rate(storage_type: str) -> str:
    """Returns the name of the rate, in seconds per weight, at which weights of a storage type are dequantized."""
    return f"dequantize {storage_type}"


def quantize_rate(weight_format: str) -> str:
    """Returns the name of the rate, in seconds per weight, at which weights are quantized while they are loaded."""
    return f"quantize {weight_format}"


def prepack_conv_rate(kernel: str) -> str:
    """Returns the name of the rate, in seconds per weight, at which convolutions are prepacked for a kernel."""
    return f"prepack {kernel}"


@dataclass(frozen=True)
class Curve:
    """Seconds per FLOP by size: interpolated between measured sizes on a log-log scale, constant beyond them.

    Args:
        points: pairs of size and seconds per FLOP, by growing size.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def from_points(cls, points: Iterable[tuple[float, float]]) -> Curve:
        """Returns the curve through measured points, lifted where noise made a larger size take less time."""
        monotone: list[tuple[float, float]] = []
        for size, seconds_per_flop in sorted(points):
            if monotone:
                smaller_size, smaller = monotone[-1]
                seconds_per_flop = max(seconds_per_flop, smaller * smaller_size / size)
            monotone.append((float(size), float(seconds_per_flop)))
        return cls(tuple(monotone))

    def at(self, size: float) -> float:
        """Returns the seconds per FLOP at a size."""
        index = bisect_left(self.points, (size, 0.0))
        if index in (0, len(self.points)):
            return self.points[min(index, len(self.points) - 1)][1]
        return _interpolate(size, *self.points[index - 1], *self.points[index])


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The speed of a machine in one dtype.

    Args:
        blocks: by kernel and width, seconds per FLOP of a transformer block without self-attention, by rows.
        attention: by head dim, seconds per FLOP of self-attention, by tokens.
        convolutions: by kernel and channels, seconds per FLOP, by positions of a frame.
        rates: seconds per byte, weight, pixel or run; see the names above.
        kernels: kernels that were chosen by timing; see `kernels.choices`.
        is_measured: false for assumed ratios to the rate of one matrix product.
    """

    blocks: Mapping[str, Mapping[int, Curve]]
    attention: Mapping[int, Curve]
    convolutions: Mapping[str, Mapping[int, Curve]]
    rates: Mapping[str, float]
    kernels: Mapping[str, str] = field(default_factory=dict)
    is_measured: bool = True

    @classmethod
    def from_matmul_rate(cls, flops_per_second: float) -> Calibration:
        """Returns what is assumed of a machine that was not measured.

        Args:
            flops_per_second: of a linear layer of medium size.
        """

        def flat(ratio: float) -> dict[int, Curve]:
            return {1024: Curve(((1024.0, ratio / flops_per_second),))}

        return cls(
            blocks={kernel: flat(ratio) for kernel, ratio in ASSUMED_BLOCK_RATIOS.items()},
            attention=flat(ASSUMED_ATTENTION_RATIO),
            convolutions={kernel: flat(ratio) for kernel, ratio in ASSUMED_CONV_RATIOS.items()},
            rates=ASSUMED_RATES,
            is_measured=False,
        )

    def block_seconds(self, flops: float, *, kernel: str, width: int, rows: int) -> float:
        """Returns the seconds of products with weights of a transformer of that width, for so many rows."""
        by_width = self.blocks.get(kernel) or self.blocks[PLAIN]
        return flops * _at(by_width, width, rows)

    def attention_seconds(self, flops: float, *, head_dim: int, tokens: int) -> float:
        """Returns the seconds of self-attention over so many tokens."""
        return flops * _at(self.attention, head_dim, tokens)

    def conv_seconds(self, flops: float, *, kernel: str, channels: int, positions: int) -> float:
        """Returns the seconds of convolutions of frames of so many positions."""
        by_channels = self.convolutions.get(kernel) or self.convolutions[PLAIN_CONV]
        return flops * _at(by_channels, channels, positions)

    @property
    def startup_seconds(self) -> float:
        """Seconds that a Python process takes until it can open a model."""
        return self.rate(START_UP)

    def rate(self, name: str) -> float:
        """Returns a rate; the assumed one if it was not measured."""
        return self.rates.get(name, ASSUMED_RATES.get(name, ASSUMED_RATES[CONVERT]))

    def to_json(self) -> dict[str, Any]:
        """Returns the measured values as plain data."""
        return {
            "blocks": {kernel: _curves_to_json(curves) for kernel, curves in self.blocks.items()},
            "attention": _curves_to_json(self.attention),
            "convolutions": {kernel: _curves_to_json(curves) for kernel, curves in self.convolutions.items()},
            "rates": dict(self.rates),
            "kernels": dict(self.kernels),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Calibration:
        """Returns the calibration that `to_json` describes.

        Raises:
            LookupError, TypeError, ValueError, AttributeError: the data has another layout.
        """
        blocks, convolutions = (
            {kernel: _curves_from_json(curves) for kernel, curves in data[key].items()}
            for key in ("blocks", "convolutions")
        )
        if PLAIN not in blocks or PLAIN_CONV not in convolutions:
            raise ValueError("the plain kernels are missing")
        return cls(
            blocks=blocks,
            attention=_curves_from_json(data["attention"]),
            convolutions=convolutions,
            rates={name: _positive(value) for name, value in data["rates"].items()},
            kernels={str(key): str(name) for key, name in data["kernels"].items()},
        )


# Times against those of a plain linear layer with the same FLOPs, on a machine that was not measured.
ASSUMED_BLOCK_RATIOS = {PLAIN: 1.1, INT8: 0.7}
ASSUMED_ATTENTION_RATIO = 1.5
ASSUMED_CONV_RATIOS = {PLAIN_CONV: 1.2, WINOGRAD_2: 0.9, WINOGRAD_4: 0.7, WINOGRAD_IMAGE: 0.4}
# Measured on a CPU with two cores and AVX2; a dequantization or quantization that is not named takes CONVERT.
ASSUMED_RATES: Mapping[str, float] = {
    READ: 1 / 1.5e9,
    MAP: 1 / 5e9,
    UPLOAD: 1 / 1e10,
    NEW_MEMORY: 1 / 2e9,
    CONVERT: 1.5e-9,
    PREPACK: 2e-9,
    **{prepack_conv_rate(kernel): 1e-8 for kernel in (WINOGRAD_2, WINOGRAD_4, WINOGRAD_IMAGE)},
    WRITE: 1e-7,
    START_UP: 4.0,
}


def _at(curves: Mapping[int, Curve], width: int, size: float) -> float:
    """Returns the seconds per FLOP at a width and a size, interpolated between the measured widths."""
    widths = sorted(curves)
    index = bisect_left(widths, width)
    if index == len(widths) or widths[index] == width or index == 0:
        return curves[widths[min(index, len(widths) - 1)]].at(size)
    below, above = widths[index - 1], widths[index]
    return _interpolate(width, below, curves[below].at(size), above, curves[above].at(size))


def _interpolate(x: float, x0: float, y0: float, x1: float, y1: float) -> float:
    share = (log(x) - log(x0)) / (log(x1) - log(x0))
    return exp(log(y0) + share * (log(y1) - log(y0)))


def _curves_to_json(curves: Mapping[int, Curve]) -> dict[str, list[list[float]]]:
    return {str(width): [list(point) for point in curve.points] for width, curve in curves.items()}


def _curves_from_json(data: Mapping[str, Any]) -> dict[int, Curve]:
    curves = {
        int(width): Curve.from_points((_positive(size), _positive(seconds)) for size, seconds in points)
        for width, points in data.items()
    }
    if not curves or not all(curve.points for curve in curves.values()):
        raise ValueError("a curve has no points")
    return curves


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{quote(value)} is not a positive number")
    return number
