"""Distances between changes, paired strictly by name. NumPy only.

For every state tensor the *change* of a step or of a whole rollout is compared: after one step a
wrong step and a right one have nearly equal weights (section 6.1 of the design). The judge is the
oracle in float64. How far a right step may be from it is measured, not guessed: the *noise* of a
tensor is the largest distance from the judge among several oracle runs in the model's own dtype:
eager as it is, and eager with the sums of a plain loop, its batch as it is and permuted. In
float64 that is the oracle's own spread; below float64 it is eager's own distance to float64.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_export.errors import ParityError
from sam_export.parity.tolerances import Tolerances

State = Mapping[str, NDArray[Any]]


_SQUARES = tuple(
    f"slot.{key}."
    for key in (
        "exp_avg_sq",
        "max_exp_avg_sq",
        "square_avg",
        "sum",
        "variance",
        "row_var",
        "col_var",
    )
)
"""Slots of torch's optimizers that add up squares of gradients."""


@dataclass(frozen=True)
class Sample:
    """One tensor or metric after one step: what the judge did, and how far others are from it.

    Attributes:
        change: L2 norm of the judge's change (of a metric: its size).
        noise: Largest distance of the oracle runs' change from the judge's.
        rounding: Least floor, from the dtype.
        error: Distance of the target's change from the judge's; infinite where they cannot be
            paired.
        exact: Whether the target must be equal (integers, flags, a step that changes nothing).
        note: Why the pairing failed, for people.
        known: Part of the change by which the target's runtime is known to be off (its artifact
            says so, and derives it).
        wide: With autocast: distance of the oracle without its casts from the judge, that is the
            part of the noise that sums in float32 have; else None.
        squared: Whether it holds squares of gradients (``exp_avg_sq``).
    """

    change: float
    noise: float
    rounding: float
    error: float = 0.0
    exact: bool = False
    note: str = ""
    known: float = 0.0
    wide: float | None = None
    squared: bool = False


def mismatches(expected: State, found: State, initial: State) -> dict[str, str]:
    """Why tensors of ``found`` cannot be paired with those of ``expected``, by name.

    Args:
        expected: What eager has now, in the model's dtype.
        found: What the target has now; without counters and generators.
        initial: What the target had at first. A slot that eager has not made must still be that.
    """
    made = {name for name in map(_slot_of, expected) if name}
    problems: dict[str, str] = {}
    for name in found:
        if name in expected:
            continue
        waits = bool(_slot_of(name)) and _slot_of(name) not in made
        if not waits:
            problems[name] = "eager has no such tensor"
        elif not np.array_equal(found[name], initial[name]):
            problems[name] = "eager has no such slot yet, but it changed"
    for name, array in expected.items():
        if name not in found:
            problems[name] = "missing in the target"
            continue
        other = found[name]
        same_dtype = other.dtype == array.dtype or (
            # Scalar slots are float64 in a graph and float32 in eager.
            name.startswith("slot.") and array.size == 1 and other.dtype.kind == array.dtype.kind
        )
        if other.shape != array.shape or not same_dtype:
            problems[name] = (
                f"target has {other.dtype}{list(other.shape)}, "
                f"eager {array.dtype}{list(array.shape)}"
            )
        elif not np.all(np.isfinite(other)):
            problems[name] = "not finite in the target"
    return problems


def _slot_of(name: str) -> tuple[str, str] | None:
    """Kind and parameter of a slot, or of what a variant keeps; None: it is neither."""
    kind, _, rest = name.partition(".")
    return (kind, rest.partition(".")[2]) if kind in ("slot", "memory") else None


def measure(
    start: State,
    after: State,
    judge: State,
    runs: Sequence[tuple[State, State]],
    steps: int,
    tol: Tolerances,
    untrained: Collection[str] = (),
    buffers: Collection[str] = (),
    wide: tuple[State, State] | None = None,
) -> dict[str, Sample]:
    """What a right target may differ by, per state tensor, with no target yet.

    Args:
        start: State before the step or rollout; a slot that is not in it counts as zero.
        after: Eager's state after it, in the model's dtype.
        judge: The float64 oracle's state after it, from the same start.
        runs: (start, after) of the oracle runs in the model's dtype.
        steps: Length of the rollout; roundings of single steps add up as its square root.
        tol: For the rounding of a single step.
        untrained: Parameters that got no gradient. They must stay exactly what they are.
        buffers: Names of the buffers; those that no run changes must stay what they are too.
        wide: With autocast: (start, after) of an oracle run without its casts.

    Raises:
        ParityError: An oracle run is not finite, so there is nothing to compare with.
    """
    samples = {}
    for name, array in after.items():
        if array.dtype.kind != "f":
            size = float(np.count_nonzero(array != start[name])) if name in start else 1.0
            samples[name] = Sample(size, 0.0, 0.0, exact=True)
            continue
        reference = change(start, judge, name)
        changes = [change(*run, name) for run in runs]
        noise = max(norm(value - reference) for value in changes)
        if not math.isfinite(noise):
            raise ParityError(
                f"Eager's own {name!r} is not finite after the step, so no target can be compared "
                "with it. Lower lr or rho, or look at the batches."
            )
        is_constant = not any(np.any(value) for value in (reference, *changes))
        samples[name] = Sample(
            change=norm(reference),
            noise=noise,
            rounding=tol.half_ulp * eps(array) * norm(array.astype(np.float64)) * math.sqrt(steps),
            exact=name in untrained or (is_constant and name in buffers),
            wide=None if wide is None else norm(change(*wide, name) - reference),
            squared=name.startswith(_SQUARES),
        )
    return samples


def with_errors(
    samples: Mapping[str, Sample],
    problems: Mapping[str, str],
    judge: State,
    after: State,
    found: State,
    known: Mapping[str, float] | None = None,
) -> dict[str, Sample]:
    """The samples of one target: distances from the judge, infinite where pairing failed.

    ``known`` is by how much of a tensor's change the target's runtime is known to be off.
    """
    result = {}
    for name, sample in samples.items():
        if name in problems:
            error = math.inf
        elif sample.exact and after[name].dtype.kind != "f":
            error = float(np.count_nonzero(found[name] != after[name]))
        else:
            # Judge and target have the same start, so this is the distance of their changes.
            against = after[name] if sample.exact else judge[name]
            error = norm(found[name].astype(np.float64) - against.astype(np.float64))
        result[name] = replace(
            sample, error=error, note=problems.get(name, ""), known=(known or {}).get(name, 0.0)
        )
    for name in problems.keys() - samples.keys():
        result[name] = Sample(0.0, 0.0, 0.0, math.inf, exact=True, note=problems[name])
    return result


def metric_sample(
    judge: float,
    runs: Sequence[float],
    found: float,
    dtype: str,
    steps: int,
    wide: float | None = None,
) -> Sample:
    """A scalar result of the step, measured like a tensor whose change is its value."""
    error = abs(found - judge)
    return Sample(
        change=abs(judge),
        noise=max(abs(value - judge) for value in runs),
        rounding=float(np.finfo(np.dtype(dtype)).eps) * abs(judge) * math.sqrt(steps),
        error=error if math.isfinite(error) else math.inf,
        note="" if math.isfinite(found) else "not finite in the target",
        wide=None if wide is None else abs(wide - judge),
    )


def flag_sample(expected: bool, found: bool) -> Sample:
    """A flag, which must be equal."""
    note = "" if expected == found else f"target says {found}, eager says {expected}"
    return Sample(1.0, 0.0, 0.0, float(expected != found), exact=True, note=note)


def change(start: State, after: State, name: str) -> NDArray[np.float64]:
    """``after - start`` of one tensor, subtracted in float64."""
    value = after[name].astype(np.float64)
    return value - start[name].astype(np.float64) if name in start else value


def norm(values: NDArray[np.float64]) -> float:
    """L2 norm; infinite where an element is not finite, so that NaN passes no comparison."""
    result = float(np.linalg.norm(values.ravel()))
    return result if math.isfinite(result) else math.inf


def eps(array: NDArray[Any]) -> float:
    """Spacing of 1 in a floating dtype."""
    return float(np.finfo(array.dtype).eps)
