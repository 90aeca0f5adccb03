"""Plots how costs grow: time and memory over tokens and frames, on logarithmic axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.axes import Axes

PANELS = {"DiT step": "s", "decode": "s", "decode's memory": "MB"}
COLOURS = ("#1f6f8b", "#d1603d", "#6a994e", "#7d5ba6", "#b08900", "#3f4e6b", "#c2185b", "#00838f")


def draw_curves(path: Path, curves_by_title: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes an SVG with a row for each title. The same figures give the same bytes."""
    matplotlib.rcParams["svg.hashsalt"] = "kadr"
    rows = len(curves_by_title)
    figure, axes = pyplot.subplots(rows, len(PANELS), figsize=(11, 3.4 * rows), layout="constrained", squeeze=False)
    for row, (title, curves) in zip(axes, curves_by_title.items(), strict=True):
        for panel, (quantity, unit) in zip(row, PANELS.items(), strict=True):
            of_panel = [curve for curve in curves if curve["quantity"] == quantity]
            if of_panel:
                _draw_panel(panel, f"{title}: {quantity}", unit, of_panel)
            else:
                panel.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _draw_panel(panel: Axes, title: str, unit: str, curves: Sequence[Mapping[str, Any]]) -> None:
    scale = 1e-6 if unit == "MB" else 1.0
    for colour, curve in zip(cycle(COLOURS), curves, strict=False):
        expected = curve["expected_exponent"]
        fit = "" if curve["exponent"] is None else f": {curve['exponent']:.2f}, expected {expected:.2f}"
        x, y = curve["x"], [value * scale for value in curve["y"]]
        panel.plot(x, y, "o-", color=colour, label=f"{curve['contender']}{fit}")
        if curve["exponent"] is not None:
            middle = len(x) // 2
            expected_y = [y[middle] * (value / x[middle]) ** expected for value in x]
            panel.plot(x, expected_y, ":", color=colour)
    panel.set(title=title, xlabel=curves[0]["variable"], ylabel=unit, xscale="log", yscale="log")
    panel.set_xticks(curves[0]["x"], [str(value) for value in curves[0]["x"]])
    panel.minorticks_off()
    panel.legend(fontsize=7)
