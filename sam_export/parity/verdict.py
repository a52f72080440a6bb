"""From measured distances to one verdict per tensor and metric."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from sam_export.parity.compare import Sample
from sam_export.parity.tolerances import Mode, Tolerances

Verdict = Literal["ok", "noise", "FAIL"]


@dataclass(frozen=True)
class Row:
    """The verdict on one tensor or metric of one target.

    Attributes:
        name: As in the contract.
        role: ``parameter``, ``buffer``, ``slot`` or ``metric``.
        mode: ``start`` (the state that was loaded), ``lock-step`` (each step from the oracle's
            state) or ``free-running`` (all steps from the start).
        step: The step judged, from 1: the worst one in lock-step and of a metric, else the last.
        change: L2 norm of the change in the judge's run, in units of the tensor.
        error: L2 distance of the target's change from it.
        floor: Noise floor of the change.
        relative: ``error / max(change, floor)``.
        bound: The error that still passes.
        verdict: ``ok``; ``noise`` (passed, but the change is below ten floors); or ``FAIL``.
        tipped: Steps in which a difference went away when weights and inputs moved a few ulps.
        note: Why the tensor could not be compared.
    """

    name: str
    role: str
    mode: Mode
    step: int
    change: float
    error: float
    floor: float
    relative: float
    bound: float
    verdict: Verdict
    tipped: int = 0
    note: str = ""

    @property
    def badness(self) -> float:
        """Error in units of what is allowed."""
        return _ratio(self.error, self.bound)


def floor_and_bound(
    sample: Sample, noise: float, relative: float, tol: Tolerances
) -> tuple[float, float]:
    """The noise floor of a sample, and the error that still passes."""
    if sample.exact:
        return 0.0, 0.0
    floor = max(noise, sample.rounding)
    is_noise = sample.change < tol.floors * floor
    allowed = tol.factor * floor
    if sample.squared and is_noise:
        # Where a gradient is all noise, one of ``factor`` floors has a square of their square.
        allowed = tol.factor**2 * floor
    if sample.wide is not None and not is_noise:
        # Sums differ as they do without autocast; of the roundings of its casts a target has no
        # more than eager. Where all is noise it may be the square of one (``exp_avg_sq``).
        allowed = tol.factor * max(sample.wide, sample.rounding) + tol.narrow * noise
    return floor, max((relative + sample.known) * max(sample.change, floor), allowed)


def is_over(sample: Sample, earlier: Sequence[float], dtype: str, tol: Tolerances) -> bool:
    """Whether a lock-step sample is over its bound, given the noise of the steps before it."""
    noise = pooled(sample, [*earlier, sample.noise], tol)
    _, bound = floor_and_bound(sample, noise, tol.relative(dtype, "lock-step"), tol)
    return not sample.error <= bound


def pooled(sample: Sample, noises: Sequence[float], tol: Tolerances) -> float:
    """The noise of a lock-step sample, given the noise of all steps.

    The few draws of one step may agree by luck, so it is at least the median. A change that is
    mere noise has no size of its own to compare with, and squares of noise (``exp_avg_sq``) vary
    by orders: it is judged by the largest of all draws.
    """
    noise = max(sample.noise, median(noises))
    return max(noises) if sample.change < tol.floors * noise else noise


def judge_steps(
    steps: Sequence[Mapping[str, Sample]],
    roles: Mapping[str, str],
    mode: Mode,
    dtype: str,
    tol: Tolerances,
    tipped: Mapping[str, int] | None = None,
) -> tuple[Row, ...]:
    """One row per tensor and metric.

    In lock-step every step counts (see `pooled`). Free-running, a state tensor is judged by its
    change over all steps and a metric at every step; noise is the largest so far, since drift only
    grows.

    Args:
        steps: Samples of each step by name, in order.
        roles: Name to role; a name that is not here is a ``buffer`` or ``slot`` by its form.
        mode: How the steps were run.
        dtype: The model's.
        tol: The tolerances.
        tipped: Name to number of steps in which a retest cleared a difference.
    """
    rows = []
    for name, judged in rows_per_step(steps, roles, mode, dtype, tol).items():
        if mode == "free-running" and judged[-1].role != "metric":
            # An early step counts only where it could not be compared, or had to be equal.
            samples = [steps[row.step - 1][name] for row in judged]
            strict = [sample.exact or math.isinf(sample.error) for sample in samples]
            judged = [row for row, s in zip(judged, strict, strict=True) if s] + judged[-1:]
        worst = max(judged, key=lambda row: (row.badness, row.relative))
        rows.append(replace(worst, tipped=(tipped or {}).get(name, 0)))
    return tuple(rows)


def rows_per_step(
    steps: Sequence[Mapping[str, Sample]],
    roles: Mapping[str, str],
    mode: Mode,
    dtype: str,
    tol: Tolerances,
) -> dict[str, list[Row]]:
    """Name to one row for each step that has it, judged as `judge_steps` says."""
    relative = tol.relative(dtype, mode)
    rows: dict[str, list[Row]] = {}
    for name in dict.fromkeys(name for step in steps for name in step):
        series = [(index, step[name]) for index, step in enumerate(steps, 1) if name in step]
        role = roles.get(name, "slot" if name.startswith("slot.") else "buffer")
        noises = [sample.noise for _, sample in series]
        if mode == "free-running":
            noises = [max(noises[: index + 1]) for index in range(len(noises))]
        else:
            noises = [pooled(sample, noises, tol) for _, sample in series]
        rows[name] = [
            _row(name, role, mode, index, sample, noise, relative, tol)
            for (index, sample), noise in zip(series, noises, strict=True)
        ]
    return rows


def _row(
    name: str,
    role: str,
    mode: Mode,
    index: int,
    sample: Sample,
    noise: float,
    relative: float,
    tol: Tolerances,
) -> Row:
    floor, bound = floor_and_bound(sample, noise, relative, tol)
    if not sample.error <= bound:
        verdict: Verdict = "FAIL"
    else:
        verdict = "noise" if not sample.exact and sample.change < tol.floors * floor else "ok"
    return Row(
        name=name,
        role=role,
        mode=mode,
        step=index,
        change=sample.change,
        error=sample.error,
        floor=floor,
        relative=_ratio(sample.error, max(sample.change, floor)),
        bound=bound,
        verdict=verdict,
        note=sample.note,
    )


def worst_per_step(
    steps: Sequence[Mapping[str, Sample]], noise: Collection[str], metrics: Collection[str]
) -> tuple[float, ...]:
    """Largest relative error of each step over the state tensors that are not noise."""
    return tuple(
        max(
            (
                _ratio(sample.error, max(sample.change, sample.noise, sample.rounding))
                for name, sample in step.items()
                if name not in noise and name not in metrics and not sample.exact
            ),
            default=0.0,
        )
        for step in steps
    )


def _ratio(value: float, unit: float) -> float:
    if value == 0.0:
        return 0.0
    return value / unit if unit > 0.0 else math.inf
