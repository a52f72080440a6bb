"""Whether some values of a graph, computed from given ones, are those of eager PyTorch."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam_export.parity.disturb import jittered
from sam_export.parity.interpret import StepGraph
from sam_export.parity.tolerances import Tolerances


@dataclass(frozen=True)
class Gap:
    """How far one value is from the judge's.

    Attributes:
        name: Node of the captured graph.
        error: L2 distance from float64's value; of integers and flags, how many differ.
        size: L2 norm of the value; of new state, that of its change.
        bound: The error that a right graph may have.
        index: Of the worst element.
        expected: That element in float64.
        found: That element in the target.
    """

    name: str
    error: float
    size: float
    bound: float
    index: tuple[int, ...]
    expected: float
    found: float

    @property
    def is_over(self) -> bool:
        """Whether the error is more than a right graph may have."""
        return not self.error <= self.bound

    @property
    def relative(self) -> float:
        """The error relative to the size; infinite where the size is 0."""
        return self.error / self.size if self.size else math.inf if self.error else 0.0


class Moved(Mapping[str, Tensor]):
    """Values by name, each floating element off by up to ``ulps`` roundings; repeatable.

    Args:
        values: What to move.
        ulps: How far.
        seed: Other seeds, other moves.
    """

    def __init__(self, values: Mapping[str, Tensor], ulps: float, seed: int) -> None:
        self._values, self._ulps, self._seed = values, ulps, seed

    def __getitem__(self, name: str) -> Tensor:
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        value = self._values[name]
        if not value.is_floating_point() or value.dtype == torch.bfloat16:
            return value
        return torch.from_numpy(jittered(value.numpy(), self._ulps, rng))

    def __contains__(self, name: object) -> bool:
        return name in self._values  # the inherited one moves the value to find that out

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def gaps(
    graph: StepGraph,
    given: Mapping[str, Tensor],
    found: Mapping[str, NDArray[Any]],
    tol: Tolerances,
) -> list[Gap]:
    """The gap of each value of ``found``.

    The judge computes the same values from the same ``given`` in float64. What a right graph may
    be off by is that of `Tolerances`, with the noise of these very values: eager's own distance to
    the judge, as it is and with ``given`` off by one rounding.

    Args:
        graph: The captured step.
        given: What ``found`` was computed from, all sources included.
        found: Values of the target by node name.
        tol: The numbers that decide.
    """
    names = list(found)
    judge = graph.evaluate(names, given, graph.judges_in_double)
    runs = [graph.evaluate(names, given)]
    eps = _eps(graph, names, given)

    def measured() -> list[Gap]:
        return [
            _gap(name, judge[name], [run[name] for run in runs], found[name], start, eps, tol)
            for name in names
            for start in [graph.start_of(name)]
        ]

    result = measured()
    if any(gap.is_over for gap in result):
        for seed in range(tol.permutations):
            runs.append(graph.evaluate(names, Moved(given, 1.0, seed)))
        result = measured()
    return result


def _eps(graph: StepGraph, names: Sequence[str], given: Mapping[str, Tensor]) -> dict[str, float]:
    """Per value, the coarsest eps of all that it is computed from, and its own."""
    nodes, ends = graph.between(names, given)
    known = {name: _eps_of(given[name]) for name in ends}
    for node in nodes:
        parts = [known.get(other.name, 0.0) for other in node.all_input_nodes]
        known[node.name] = max([_eps_of(graph.values.get(node.name)), *parts])
    return {name: known[name] for name in names}


def _eps_of(value: Tensor | None) -> float:
    floating = value is not None and value.is_floating_point()
    return torch.finfo(value.dtype).eps if floating else 0.0  # type: ignore[union-attr]


def _gap(
    name: str,
    judge: Tensor,
    runs: Sequence[Tensor],
    found: NDArray[Any],
    start: Tensor | None,
    eps: Mapping[str, float],
    tol: Tolerances,
) -> Gap:
    own = runs[0].numpy()
    if found.shape != own.shape or found.dtype != own.dtype:
        return Gap(name, math.inf, math.inf, 0.0, (), math.nan, math.nan)
    if own.dtype.kind != "f":
        differs = found != own
        index = _index(differs)
        size = float(max(own.size, 1))
        return Gap(name, float(differs.sum()), size, 0.0, index, *_at(own, found, index))
    right, other = judge.double().numpy(), found.astype(np.float64)
    mask = np.isfinite(own) & np.isfinite(right)
    # Where eager itself is not finite, the target has to be the same: an infinity, or no number.
    apart = ~mask & ~((own == found) | (np.isnan(own) & np.isnan(found)))
    apart |= mask & ~np.isfinite(other)
    if apart.any():
        index = _index(apart)
        return Gap(name, math.inf, _norm(right, mask), 0.0, index, *_at(own, found, index))
    with np.errstate(invalid="ignore"):  # the difference of two infinities, which is masked
        noise = max(_norm(run.double().numpy() - right, mask) for run in runs)
        change = right if start is None else right - start.double().numpy()
        off = np.where(mask, np.abs(other - right), 0.0)
    size, error = _norm(change, mask), _norm(off, mask)
    relative = tol.exact if eps[name] < 1e-12 else min(tol.kernel * eps[name], tol.drift)
    floor = max(noise, tol.half_ulp * max(eps[name], _eps_of(runs[0])) * _norm(right, mask))
    bound = max(relative * max(size, floor), tol.factor * floor)
    index = _index(off)
    return Gap(name, error, size, bound, index, *_at(right, found, index))


def _norm(values: NDArray[Any], mask: NDArray[Any]) -> float:
    return float(np.linalg.norm(np.where(mask, values, 0.0).ravel()))


def _index(size: NDArray[Any]) -> tuple[int, ...]:
    if not size.size:
        return ()
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(size)), size.shape))


def _at(expected: NDArray[Any], found: NDArray[Any], index: tuple[int, ...]) -> tuple[float, float]:
    if not expected.size:
        return math.nan, math.nan
    return float(expected[index]), float(found[index])
