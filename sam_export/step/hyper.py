"""Hyper-parameters of a SAM optimizer: graph inputs, and constants of the graph."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from sam_export.errors import StepConfigError
from sam_export.step.sam import SAM

_NOT_BAKED = {
    *("params", "param_names", "initial_lr"),
    *("foreach", "fused", "capturable", "differentiable"),
}
"""What parameter groups hold that changes no result: names, a scheduler's note, the form of the
update."""


def group_key(optimizer: SAM, name: str) -> str:
    """Under which key the parameter groups hold a hyper-parameter."""
    return {"rho": optimizer.radius_key, "base_rho": "rho"}.get(name, name)


def hyper_of(optimizer: SAM, names: Sequence[str]) -> dict[str, list[float]]:
    """Current values of each parameter group.

    Args:
        optimizer: Whose groups.
        names: ``rho``, and numeric options of the base optimizer.

    Raises:
        StepConfigError: A group has no number of that name.
    """
    found: dict[str, list[float]] = {}
    groups = optimizer.param_groups
    for name in names:
        values: list[Any] = [group.get(group_key(optimizer, name)) for group in groups]
        if not all(map(_is_number, values)):
            numbers = sorted(key for key, value in groups[0].items() if _is_number(value))
            raise StepConfigError(
                f"{name!r} is no number in the parameter groups of "
                f"{type(optimizer.base_optimizer).__name__} ({values[0]!r}); those that are: "
                f"{', '.join(numbers)}."
            )
        found[name] = [float(value) for value in values]
    return found


def baked_of(optimizer: SAM, dynamic: Collection[str]) -> list[dict[str, Any]]:
    """Options of the base optimizer per group that are not in ``dynamic``, as JSON values."""
    left_out = {group_key(optimizer, name) for name in dynamic} | _NOT_BAKED
    return [
        {key: _plain(value) for key, value in group.items() if key not in left_out}
        for group in optimizer.param_groups
    ]


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.is_floating_point()
    is_plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_plain and math.isfinite(value)


def _plain(value: Any) -> Any:
    """An option as a JSON value; what has none, by its text."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    is_plain = value is None or isinstance(value, (bool, int, float, str))
    return value if is_plain else str(value)
