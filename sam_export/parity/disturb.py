"""The small disturbances that show how much rounding noise a step has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sam_export.parity.oracle_batch import Batch
from sam_export.parity.tolerances import Tolerances

SMALLEST = 3
"""Fewer examples than this cannot be permuted to any effect: a + b is b + a, bit for bit."""


def moves(dtype: str, casts_to: torch.dtype | None, tol: Tolerances) -> tuple[float, float]:
    """How far weights and inputs are moved, in roundings of ``dtype``: for a retest, for a draw.

    Args:
        dtype: The model's.
        casts_to: Dtype of autocast, whose roundings count then; None: no autocast.
        tol: How many of them.
    """
    if casts_to is None:
        return tol.nudge, 1.0
    unit = torch.finfo(casts_to).eps / float(np.finfo(dtype).eps)
    return tol.narrow_nudge * unit, tol.narrow_jitter * unit


def about_casts(casts_to: torch.dtype, tol: Tolerances) -> str:
    """By what rule a step with autocast passes, for people."""
    name = str(casts_to).removeprefix("torch.")
    return (
        f"autocast to {name}, judged by float64 without it: an error passes up to {tol.narrow:g} "
        f"floors, and {tol.factor:g} times what eager's floor is without the casts"
    )


def map_batch(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    """The batch with every entry changed."""
    if isinstance(batch, Mapping):
        return {key: change(value) for key, value in batch.items()}
    return tuple(change(value) for value in batch)


def examples(batch: Batch) -> int:
    """Size of the first dimension of the first tensor that has one."""
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next((len(value) for value in values if len(value.shape)), 1)


def can_permute(batch: Batch, parts: int) -> bool:
    """Whether each part of a batch has enough examples for their order to matter."""
    return examples(batch) >= SMALLEST * parts


def permuted(batch: Batch, rng: np.random.Generator, parts: int = 1) -> Batch:
    """The same examples in another order; of several equal parts, each keeps its examples."""
    count = examples(batch)
    length = count // parts
    order = np.concatenate([at + rng.permutation(length) for at in range(0, count, length)])

    def reordered(value: Any) -> Any:
        if not len(value.shape) or len(value) != count:
            return value
        return (
            value[torch.from_numpy(order).to(value.device)] if _is_tensor(value) else value[order]
        )

    return map_batch(batch, reordered)


def jittered(array: NDArray[Any], ulps: float, rng: np.random.Generator) -> NDArray[Any]:
    """Each element of a floating array, off by up to ``ulps`` roundings of its dtype."""
    if array.dtype.kind != "f":
        return array
    step = ulps * float(np.finfo(array.dtype).eps)
    moved: NDArray[Any] = array * (1.0 + step * rng.uniform(-1.0, 1.0, array.shape))
    return np.asarray(moved, dtype=array.dtype)


def jittered_input(value: Any, ulps: float, rng: np.random.Generator, dtype: str) -> Any:
    """A batch entry, off by up to ``ulps`` roundings of the model\'s dtype; integers stay."""
    # An input of a wider dtype than the model's is still rounded to the model's.
    array = value.detach().cpu().numpy() if _is_tensor(value) else np.asarray(value)
    if array.dtype.kind != "f":
        return value
    ratio = float(np.finfo(dtype).eps / np.finfo(array.dtype).eps)
    moved = jittered(array, ulps * max(ratio, 1.0), rng)
    return torch.from_numpy(moved).to(value.device) if _is_tensor(value) else moved


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
