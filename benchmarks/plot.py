"""Plots how costs grow: time and memory over tokens and frames, on logarithmic axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.axes import Axes

PANELS = {"DiT step": "s", "decode": "s", "decode's memory": "MB"}
COLOURS = ("#1f6f8b", "#d1603d", "#6a994e", "#7d5ba6")


def draw_curves(path: Path, curves: Sequence[Mapping[str, Any]]) -> None:
    """Writes an SVG. The same figures give the same bytes."""
    matplotlib.rcParams["svg.hashsalt"] = "kadr"
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 3.4), layout="constrained")
    for panel, (quantity, unit) in zip(axes, PANELS.items(), strict=True):
        _draw_panel(panel, quantity, unit, [curve for curve in curves if curve["quantity"] == quantity])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _draw_panel(panel: Axes, quantity: str, unit: str, curves: Sequence[Mapping[str, Any]]) -> None:
    scale = 1e-6 if unit == "MB" else 1.0
    for colour, curve in zip(COLOURS, curves, strict=False):
        expected = curve["expected_exponent"]
        fit = "" if curve["exponent"] is None else f": {curve['exponent']:.2f}, expected {expected:.2f}"
        x, y = curve["x"], [value * scale for value in curve["y"]]
        panel.plot(x, y, "o-", color=colour, label=f"{curve['contender']}{fit}")
        if curve["exponent"] is not None:
            middle = len(x) // 2
            expected_y = [y[middle] * (value / x[middle]) ** expected for value in x]
            panel.plot(x, expected_y, ":", color=colour)
    variable = curves[0]["variable"] if curves else ""
    panel.set(title=quantity, xlabel=variable, ylabel=unit, xscale="log", yscale="log")
    if curves:
        panel.set_xticks(curves[0]["x"], [str(value) for value in curves[0]["x"]])
        panel.minorticks_off()
        panel.legend(fontsize=7)
