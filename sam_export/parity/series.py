"""Each tensor's error over the steps: what the drift plots and the heat map show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sam_export.parity.tolerances import Mode
from sam_export.parity.verdict import Row

_FEWEST = 3
"""Points that a slope needs; a line through two says nothing."""


@dataclass(frozen=True)
class TensorSeries:
    """One tensor's or metric's error at each step of one mode.

    Attributes:
        name: As in the contract.
        mode: ``lock-step`` or ``free-running``.
        relative: ``error / max(change, floor)`` of each step, to 4 significant digits; infinite
            where the tensors could not be paired, None where there was nothing to compare.
        ratio: ``error / bound`` likewise: above 1 the tensor is outside its band.
        growth: Slope of the least-squares line through log10(relative error) over the steps, in
            decades per step: 0.01 is a factor of 10 in 100 steps. Errors of 0 are left out; None
            with fewer than three others.
        absent: Steps in which there was nothing to compare, such as a slot that eager has not made
            yet: in JSON, infinite is null too.
        first_over: First step outside the band, from 1; None where there is none. Free-running, a
            state tensor may be outside on the way: the change after all steps is what is judged.
    """

    name: str
    mode: Mode
    relative: tuple[float | None, ...]
    ratio: tuple[float | None, ...]
    growth: float | None
    absent: tuple[int, ...]
    first_over: int | None


def series_of(rows: Mapping[str, Sequence[Row]], steps: int) -> tuple[TensorSeries, ...]:
    """The series of every name of one mode.

    Args:
        rows: Name to one row for each step that it was there, as `rows_per_step` gives them.
        steps: Number of steps that were run.
    """
    result = []
    for name, judged in rows.items():
        relative: list[float | None] = [None] * steps
        ratio: list[float | None] = [None] * steps
        for row in judged:
            relative[row.step - 1] = _short(row.relative)
            ratio[row.step - 1] = _short(row.badness)
        result.append(
            TensorSeries(
                name=name,
                mode=judged[0].mode,
                relative=tuple(relative),
                ratio=tuple(ratio),
                growth=growth(relative),
                absent=tuple(step for step, value in enumerate(ratio, 1) if value is None),
                first_over=next((row.step for row in judged if row.verdict == "FAIL"), None),
            )
        )
    return tuple(result)


def growth(errors: Sequence[float | None]) -> float | None:
    """Slope of log10(error) over the step, in decades per step; see `TensorSeries`."""
    points = [
        (step, math.log10(error))
        for step, error in enumerate(errors)
        if error is not None and 0.0 < error < math.inf
    ]
    if len(points) < _FEWEST:
        return None
    at, height = np.array(points, np.float64).T
    at, height = at - at.mean(), height - height.mean()
    return _short(float(at @ height / (at @ at)))


def _short(value: float) -> float:
    return float(f"{value:.4g}")
