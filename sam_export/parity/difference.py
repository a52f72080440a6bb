"""What a tensor that is over its bound looks like: worst element, direction, ulps, histogram.

The arrays are gone when the verdict is made, so each tensor that may turn out to differ is
described when it is compared, in a few numbers. NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sam_export.artifact.contract import STAGE
from sam_export.parity.tolerances import Mode

Stage = Literal[
    "start",
    "loss",
    "gradients",
    "grad_norm",
    "perturbations",
    "perturbation_norm",
    "perturbed_loss",
    "adversarial gradients",
    "finite",
    "slots",
    "parameters",
    "buffers",
]

STAGES: tuple[Stage, ...] = get_args(Stage)
"""In the order in which a step computes them: the first one that differs is where to look."""

INNER_STAGES: tuple[Stage, ...] = ("gradients", "perturbations", "adversarial gradients")
"""Those that only a step captured with its stages returns."""

_INNER: dict[str, Stage] = dict(zip(("g", "eps", "g_adv"), INNER_STAGES, strict=True))
"""Kind of an output of a step captured with its stages to the stage that it is."""

_MODES: tuple[Mode, ...] = ("start", "lock-step", "free-running")
"""Lock-step before free-running: there a step cannot have its error from an earlier one."""

DECADES = tuple(range(-4, 5))
"""Exponents of 10 between which the bins of a histogram lie."""


@dataclass(frozen=True)
class Difference:
    """How one tensor or metric of a target differs from the oracle, in the step named.

    The *share* of an element is ``bound / sqrt(elements)``: if every element were off by its share,
    the tensor would be off by exactly its bound.

    Attributes:
        name: As in the contract.
        stage: Part of the step that computes it, one of `STAGES`.
        mode: As in `Row`.
        step: From 1; 0 for the start state.
        error: L2 distance of the target's change from the judge's, in units of the tensor;
            infinite where an element is not finite or the tensors cannot be paired.
        relative: ``error / change``, with the change in the judge's run; of a start state, which
            has no change, and of a metric relative to its size. None where that is 0.
        note: Why the tensors cannot be paired; empty where they can.
        elements: Number of elements.
        over: How many of them are off by more than their share.
        not_finite: How many are not finite in the target.
        index: Of the element that is off most (not finite ones first).
        before: That element before the step; None where there is none (metrics, new slots).
        expected: Its right value afterwards.
        found: The target's value.
        cosine: Between both changes, over the elements that are finite in the target: 1 says
            that only the length is wrong, -1 that the sign is. None where a change is 0.
        length: L2 norm of the target's change over that of the judge's, likewise.
        ulp_max: Largest number of representable values between found and expected, in the
            tensor's dtype; None for integers and where nothing is finite.
        ulp_median: Median of that number.
        histogram: Elements by ``|error| / share``: below 1e-4, one bin per decade up to 1e4, and
            above or not finite.
    """

    name: str
    stage: Stage
    mode: Mode
    step: int
    error: float
    relative: float | None
    note: str = ""
    elements: int = 0
    over: int = 0
    not_finite: int = 0
    index: tuple[int, ...] | None = None
    before: float | None = None
    expected: float | None = None
    found: float | None = None
    cosine: float | None = None
    length: float | None = None
    ulp_max: int | None = None
    ulp_median: float | None = None
    histogram: tuple[int, ...] = ()

    @property
    def order(self) -> tuple[int, int, int]:
        """Key that sorts differences by where the step goes wrong first."""
        return _MODES.index(self.mode), self.step, STAGES.index(self.stage)


def stage_of(name: str, parameters: Collection[str], mode: Mode) -> Stage:
    """The part of the step that computes a tensor or metric."""
    if mode == "start":
        return "start"
    if name.startswith(STAGE):
        return _INNER[name.split(".")[1]]
    for stage in STAGES[1:9]:
        if name == stage:
            return stage
    if name.startswith("slot."):
        return "slots"
    return "parameters" if name in parameters else "buffers"


def describe(
    name: str,
    stage: Stage,
    mode: Mode,
    step: int,
    found: NDArray[Any],
    expected: NDArray[Any],
    before: NDArray[Any] | None,
    bound: float,
) -> Difference:
    """Describes by how much ``found`` is not ``expected``.

    Args:
        name: As in the contract.
        stage: As `stage_of` says.
        mode: How the step was run.
        step: From 1.
        found: What the target has.
        expected: What the judge has, finite, of the same shape.
        before: What both had before; None where there was nothing.
        bound: The L2 distance that would pass.
    """
    right = expected.astype(np.float64).ravel()
    value = found.astype(np.float64).ravel()
    start = np.zeros_like(right) if before is None else before.astype(np.float64).ravel()
    finite = np.isfinite(value)
    with np.errstate(invalid="ignore", over="ignore"):
        off = np.abs(value - right)
    off[~finite] = math.inf
    worst = int(np.argmax(off))
    share = bound / math.sqrt(max(right.size, 1))
    ours, theirs = (value - start)[finite], (right - start)[finite]
    lengths = float(np.linalg.norm(ours)), float(np.linalg.norm(theirs))
    error = float(np.linalg.norm(off)) if finite.all() else math.inf
    unit = float(np.linalg.norm(right if mode == "start" else right - start))
    ulps = ulp_distance(found.ravel()[finite], expected.ravel()[finite])
    return Difference(
        name=name,
        stage=stage,
        mode=mode,
        step=step,
        error=error,
        relative=error / unit if unit > 0.0 else None,
        elements=right.size,
        over=int(np.count_nonzero(off > share)),
        not_finite=int(np.count_nonzero(~finite)),
        index=tuple(int(i) for i in np.unravel_index(worst, expected.shape)),
        before=None if before is None else float(start[worst]),
        expected=float(right[worst]),
        found=float(value[worst]),
        cosine=_cosine(ours, theirs, lengths),
        length=lengths[0] / lengths[1] if lengths[1] > 0.0 else None,
        ulp_max=None if ulps is None else int(ulps.max()),
        ulp_median=None if ulps is None else float(np.median(ulps)),
        histogram=_histogram(off, share),
    )


def ulp_distance(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.uint64] | None:
    """Number of representable values from one to the other, in the dtype of ``found``.

    IEEE floats of one sign are ordered as their bits are; the negative ones are put below the
    positive ones, with -0 where 0 is. ``expected`` is rounded to the dtype first.

    Returns:
        None where ``found`` is not a float16, float32 or float64 array, or is empty.
    """
    if found.dtype.kind != "f" or found.dtype.itemsize not in (2, 4, 8) or not found.size:
        return None
    with np.errstate(over="ignore", under="ignore"):  # a value beyond the dtype is its infinity
        rounded = expected.astype(found.dtype)
    first, second = _ordered(found), _ordered(rounded)
    return np.maximum(first, second) - np.minimum(first, second)


def _ordered(values: NDArray[Any]) -> NDArray[np.uint64]:
    middle = np.uint64(1) << np.uint64(8 * values.dtype.itemsize - 1)
    bits = values.view(f"u{values.dtype.itemsize}").astype(np.uint64)
    magnitude = bits & (middle - np.uint64(1))
    ordered: NDArray[np.uint64] = np.where(bits >= middle, middle - magnitude, middle + magnitude)
    return ordered


def _cosine(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], lengths: tuple[float, float]
) -> float | None:
    if not min(lengths) > 0.0:
        return None
    # Each divided by its own length first: the product of two tiny lengths would be 0.
    return float(np.clip(np.dot(ours / lengths[0], theirs / lengths[1]), -1.0, 1.0))


def _histogram(off: NDArray[np.float64], share: float) -> tuple[int, ...]:
    # Where all must be equal, 0 is in the first bin and all else in the last one.
    ratio = off / share if share > 0.0 else np.where(off == 0.0, 0.0, math.inf)
    # A bin holds its upper edge: an error of exactly one share is within.
    edges = [10.0**exponent for exponent in DECADES]
    counts = np.bincount(np.searchsorted(edges, ratio, side="left"), minlength=len(edges) + 1)
    return tuple(int(count) for count in counts)
