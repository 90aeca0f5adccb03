"""The figures of a measured case as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kadr.bench.runner import Measurement


def summarize(measurements: Sequence[Measurement], flops: int | None) -> list[dict[str, Any]]:
    """Returns the figures of each contender; ratios are to the first of them. Yardsticks are not listed.

    A share of the matmul is the median over the rounds. A share of the peak is that of the best round's peak: another
    program that slows the loop down must not make a contender look better.
    """
    ranked = [each for each in measurements if not each.contender.is_yardstick]
    yardsticks = [each for each in measurements if each.contender.is_yardstick]
    matmuls = {each.contender.dtype: each for each in yardsticks if not each.contender.is_peak}
    peaks = {each.contender.dtype: _best_rate(each) for each in yardsticks if each.contender.is_peak}
    return [
        _figures(each, ranked[0], flops, matmuls.get(each.contender.arithmetic), peaks.get(each.contender.arithmetic))
        for each in ranked
    ]


def _best_rate(yardstick: Measurement) -> float:
    return yardstick.contender.yardstick_flops / min(yardstick.seconds)


def _figures(
    measurement: Measurement, first: Measurement, flops: int | None, matmul: Measurement | None, peak: float | None
) -> dict[str, Any]:
    contender = measurement.contender
    rate = None if flops is None else flops / measurement.median
    share_of_matmul = None
    if flops is not None and matmul is not None:  # the matmul of the same round
        share_of_matmul = flops / matmul.contender.yardstick_flops / measurement.ratio(matmul)
    return {
        "name": contender.name,
        "dtype": contender.dtype,
        "products": contender.arithmetic,
        "seconds": measurement.seconds,
        "repeats": measurement.repeats,
        "median": measurement.median,
        "interquartile_range": measurement.interquartile_range,
        "ratio": measurement.ratio(first),
        "flops_per_second": rate,
        "matmul_per_second": None if matmul is None else matmul.contender.yardstick_flops / matmul.median,
        "share_of_matmul": share_of_matmul,
        "peak_per_second": peak,
        "share_of_peak": None if rate is None or peak is None else rate / peak,
        "peak_bytes": measurement.peak_bytes,
        "weight_bytes": contender.weight_bytes,
        "error": measurement.error,
        "note": contender.note,
    }
