"""What a variant of SAM may do otherwise: what is ascended, and what the base optimizer gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sam_export.errors import StepConfigError

Gradients = Mapping[str, Tensor]
"""By parameter name; a parameter that the loss does not use is absent."""

Memory = Mapping[str, Mapping[str, Tensor]]
"""Parameter name -> key -> value: what a variant keeps from step to step."""


class Variant:
    """A variant of SAM as pure functions of gradients by name; this one is SAM itself.

    In a graph all of them are traced: no branch on a value, nothing read into Python.

    Attributes:
        keys: Names of the tensors that it keeps for each parameter, of the parameter's shape and
            dtype; they start at 0.
        starts: Whether its first step is another function than the later ones.
    """

    keys: ClassVar[tuple[str, ...]] = ()
    starts: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """For the manifest: ``sam``, ``GSAM(alpha=0.4)``."""
        return "sam" if type(self) is Variant else repr(self)

    def ascended(
        self, gradients: Gradients, memory: Memory, started: Tensor | None
    ) -> tuple[Gradients, Memory]:
        """The direction that the perturbation is made from, and the new memory.

        Args:
            gradients: At ``w``.
            memory: What `keys` names.
            started: Where `starts`: a scalar, 0 before the first step.
        """
        return gradients, memory

    def descended(
        self, gradients: Gradients, perturbed: Gradients, memory: Memory
    ) -> tuple[Gradients, Memory]:
        """What the base optimizer gets, and the new memory.

        Args:
            gradients: At ``w``.
            perturbed: At ``w + eps_w``; it has the same parameters.
            memory: What `keys` names.
        """
        return perturbed, memory

    def between(self, gradients: Gradients, memory: Memory) -> Gradients:
        """What the base optimizer gets in a step without a perturbation.

        Args:
            gradients: At ``w``.
            memory: What `keys` names.
        """
        return gradients


def inner(one: Gradients, other: Gradients) -> Tensor:
    """``sum_i <a_i, b_i>`` over the parameters, a scalar of at least float32."""
    products = [
        torch.sum((value * other[name]).flatten(), dtype=_wide(value))
        for name, value in one.items()
    ]
    return torch.stack(products).sum()


def checked_number(owner: str, name: str, value: Any, least: float, most: float) -> float:
    """A number within ``[least, most]``.

    Raises:
        StepConfigError: It is something else.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not least <= value <= most:
        between = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise StepConfigError(f"{owner}({name}={value!r}): expected a finite number, {between}.")
    return float(value)


def remembered(memory: Memory, key: str, names: Sequence[str]) -> dict[str, Tensor]:
    """One tensor per parameter out of the memory."""
    return {name: memory[name][key] for name in names}


def with_remembered(memory: Memory, key: str, values: Gradients) -> dict[str, dict[str, Tensor]]:
    """The memory with other tensors under ``key``."""
    return {
        name: {**own, **({key: values[name]} if name in values else {})}
        for name, own in memory.items()
    }


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
