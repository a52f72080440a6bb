"""Describes what differs while its arrays are there, and picks what the report says of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_export.parity.compare import Sample, State
from sam_export.parity.difference import Difference, Stage, describe, stage_of
from sam_export.parity.panel import Round, Stepped
from sam_export.parity.series import TensorSeries
from sam_export.parity.tolerances import Mode, Tolerances
from sam_export.parity.verdict import Row, floor_and_bound

Described = dict[tuple[str, Mode, int], Difference]
"""By name, mode and step."""

KEPT = 12
"""Differences that a target's report holds: first ones and worst ones, half and half."""


def describe_step(
    mode: Mode,
    step: int,
    samples: Mapping[str, Sample],
    this: Round,
    found: Stepped,
    parameters: Collection[str],
    dtype: str,
    tol: Tolerances,
) -> Described:
    """Differences of the samples that may fail, once all steps are known.

    The noise that decides is known at the end and is never less than the step's own, so a sample
    within the bound of that one cannot fail. Shares and histograms are in units of that bound.

    Args:
        mode: How the step was run.
        step: From 1.
        samples: As compared.
        this: The oracle runs of the step.
        found: What the target made of it.
        parameters: Their names.
        dtype: The model's.
        tol: The tolerances.
    """
    result: Described = {}
    relative = tol.relative(dtype, mode)
    for name, sample in samples.items():
        _, bound = floor_and_bound(sample, sample.noise, relative, tol)
        if sample.error <= bound:
            continue
        stage = stage_of(name, parameters, mode)
        value, right, before = _arrays(name, sample, this, found, dtype)
        made = _described(name, stage, mode, step, value, right, before, bound, sample.note)
        result[name, mode, step] = made
    return result


def describe_start(
    expected: State, found: State, problems: Mapping[str, str], parameters: Collection[str]
) -> Described:
    """Differences of the state that a session began with, which had to be eager's."""
    return {
        (name, "start", 0): _described(
            name,
            stage_of(name, parameters, "start"),
            "start",
            0,
            found.get(name),
            expected.get(name),
            None,
            0.0,
            note,
        )
        for name, note in problems.items()
    }


def chosen(
    described: Described,
    failed: Sequence[Row],
    series: Iterable[TensorSeries],
    parameters: Collection[str],
) -> tuple[Difference, ...]:
    """What to say of the rows that failed: one difference per tensor, where it first left its band.

    Args:
        described: All that was described.
        failed: The rows that differ, worst first.
        series: Of all modes, for the first step outside the band.
        parameters: Names of the parameters.

    Returns:
        At most `KEPT`, in the order in which the steps go wrong: lock-step first, then by step and
        stage, the worst one first.
    """
    first_over = {(item.name, item.mode): item.first_over for item in series}
    rank: dict[str, int] = {}
    for row in failed:
        rank.setdefault(row.name, len(rank))
    by_name: dict[str, Difference] = {}
    for row in failed:
        step = first_over.get((row.name, row.mode)) or row.step
        found = described.get((row.name, row.mode, step)) or Difference(
            name=row.name,
            stage=stage_of(row.name, parameters, row.mode),
            mode=row.mode,
            step=step,
            error=row.error,
            relative=row.relative,
            note=row.note or "cleared by a retest, and over the bound with the noise of all steps",
        )
        held = by_name.get(row.name)
        if held is None or found.order < held.order:
            by_name[row.name] = found
    ordered = sorted(by_name.values(), key=lambda item: (item.order, rank[item.name]))
    keep = {item.name for item in ordered[: KEPT // 2]}
    for name in rank:  # worst first
        if len(keep) < KEPT:
            keep.add(name)
    return tuple(item for item in ordered if item.name in keep)


_Arrays = tuple[NDArray[Any] | None, NDArray[Any] | None, NDArray[Any] | None]


def _arrays(name: str, sample: Sample, this: Round, found: Stepped, dtype: str) -> _Arrays:
    """Found, expected and before, each None where there is none."""
    if name == "finite":
        return np.array(found.finite), np.array(this.eager.finite), None
    if name in this.judge.metrics:
        with np.errstate(over="ignore"):
            value = np.array(found.metrics[name]).astype(dtype)
        return value, np.array(this.judge.metrics[name]), None
    judge = this.eager if sample.exact else this.judge
    return found.state.get(name), judge.state.get(name), this.eager.start.get(name)


def _described(
    name: str,
    stage: Stage,
    mode: Mode,
    step: int,
    found: NDArray[Any] | None,
    expected: NDArray[Any] | None,
    before: NDArray[Any] | None,
    bound: float,
    note: str,
) -> Difference:
    if found is None or expected is None or found.shape != expected.shape or not expected.size:
        return Difference(name, stage, mode, step, np.inf, None, note)
    made = describe(name, stage, mode, step, found, expected, before, bound)
    return replace(made, note=note)
