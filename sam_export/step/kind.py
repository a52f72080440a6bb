"""Which SAM a step is of, and the parameter groups that it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from sam_export.step.variants.variant import Memory, Variant

Perturb = Callable[
    [Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Any]], Mapping[str, Tensor]
]
"""(parameters, gradients, radii) -> ``eps``, by name."""

NOTHING: Memory = MappingProxyType({})
"""The memory of a variant that keeps nothing."""


@dataclass(frozen=True)
class Group:
    """One parameter group: names of its parameters and its weight decay."""

    names: tuple[str, ...]
    weight_decay: float | Tensor = 0.0


@dataclass(frozen=True)
class Kind:
    """Which SAM the passes are of.

    Attributes:
        variant: What is ascended and what the base optimizer gets.
        perturb: Another ``eps``: a function of parameters, gradients and radii, by name.
        ascent_steps: How many steps of length ``rho / ascent_steps`` the ascent takes, each along
            the gradient where the last one ended.
    """

    variant: Variant = field(default_factory=Variant)
    perturb: Perturb | None = None
    ascent_steps: int = 1


SAM_ITSELF = Kind()
