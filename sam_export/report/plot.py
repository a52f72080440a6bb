"""A picture of two trainings that should be one: loss curves on top of each other, and parity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam_export.errors import SamExportError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#333333"
_GRID = "#e3e3e3"
_CURVE_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#f2b36b", "linewidth": 5.0},
    {"color": "#14466b", "linewidth": 1.3},
    {"color": "#2e8b57", "linewidth": 1.3, "linestyle": (0, (4, 3))},
    {"color": "#b03060", "linewidth": 1.3, "linestyle": (0, (1, 2))},
)
"""The first one is broad and pale, so that it shows under one that coincides with it."""

_PARITY_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#9fd3b0", "marker": "o", "markersize": 9, "linewidth": 4.0},
    {"color": "#14466b", "marker": "o", "markersize": 3.5, "linewidth": 1.0},
    {"color": "#8a6d3b", "marker": "^", "markersize": 4, "linewidth": 1.0},
    {"color": "#b03060", "marker": "D", "markersize": 3.5, "linewidth": 1.0},
)
_FLOOR_FACTOR = 0.1
"""An error of exactly 0 has no place on a log axis: it is drawn this far below the others."""


def plot_training(
    curves: Mapping[str, Sequence[float]],
    parity_per_step: Mapping[str, Sequence[float]],
    tolerance: float | None,
    path: str | Path,
) -> Path:
    """Writes a PNG with the loss curves on the left and the parity of each step on the right.

    Args:
        curves: Name to loss per step; the first one is drawn broad, under the others.
        parity_per_step: Name to relative error per step (0 or more), on a log axis; likewise.
        tolerance: The error that still passes; None leaves the line out.
        path: The file to write; its folder is made.

    Returns:
        The path written.

    Raises:
        SamExportError: matplotlib is not installed, or there is nothing to draw.
    """
    if not curves or not parity_per_step or not all((*curves.values(), *parity_per_step.values())):
        raise SamExportError(
            "plot_training was given no curve or an empty one; expected at least one loss curve "
            "and one parity series, each with a value per step."
        )
    try:
        # Figure with its own canvas: pyplot would pick a backend for the whole process.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SamExportError(
            "A plot was asked for, but matplotlib is not installed. "
            "Install it with: pip install 'sam_export[report]'."
        ) from error

    figure = Figure(figsize=(11, 4.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_curves(left, curves)
    _draw_parity(right, parity_per_step, tolerance)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=144, format="png")
    return target


def _draw_curves(axes: Axes, curves: Mapping[str, Sequence[float]]) -> None:
    for (name, values), style in zip(curves.items(), cycle(_CURVE_STYLES), strict=False):
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, label=name, solid_capstyle="round", **style)
    _dress(axes, "Training loss", "loss")
    axes.set_ylim(bottom=0)


def _draw_parity(
    axes: Axes, parity_per_step: Mapping[str, Sequence[float]], tolerance: float | None
) -> None:
    axes.set_yscale("log")
    errors = [value for values in parity_per_step.values() for value in values]
    levels = [value for value in (*errors, tolerance or 0.0) if value > 0 and math.isfinite(value)]
    floor = _FLOOR_FACTOR * min(levels, default=1e-15)
    for (name, values), style in zip(parity_per_step.items(), cycle(_PARITY_STYLES), strict=False):
        drawn = [floor if value == 0 else value for value in values]
        steps = range(1, len(values) + 1)
        axes.plot(steps, drawn, label=name, **style)
    if tolerance is not None:
        axes.axhline(tolerance, color=_INK, linewidth=1.0, linestyle=(0, (5, 4)))
        axes.annotate(
            f"tolerance {tolerance:.1e}",
            xy=(1.0, tolerance),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=_INK,
        )
    exact = " (lowest points: exactly 0)" if 0.0 in errors else ""
    _dress(axes, "Parity per step", f"relative error{exact}")
    axes.set_ylim(top=3 * axes.get_ylim()[1])  # room for the words over the tolerance


def _dress(axes: Axes, title: str, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=12, color=_INK)
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel(label, color=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK, length=3, which="both")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
