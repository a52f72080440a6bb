"""Perturbations other than ``rho g / ||g||``: what one is, and what it must return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sam_export.errors import StepConfigError

Perturbation = Callable[
    [Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]
]
"""``(parameters, gradients, radii) -> eps``, all by name: a pure function of tensors.

``gradients`` has an entry for every parameter that the loss depends on; so must ``eps``, of the
same shapes and dtypes. ``radii`` are the groups' ``rho``, float64 scalars. In a graph all of them
are traced: no branch on a value, nothing read into Python.
"""


def perturbed_by(
    perturbation: Perturbation,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    radius: Mapping[str, float | Tensor],
) -> dict[str, Tensor]:
    """``eps`` by name, from a perturbation that keeps to its contract.

    Raises:
        StepConfigError: It returned other names, shapes or dtypes than the gradients'.
    """
    radii = {
        name: torch.as_tensor(radius[name], dtype=torch.float64).to(gradient.device)
        for name, gradient in gradients.items()
    }
    made = perturbation(parameters, gradients, radii)
    if not isinstance(made, Mapping):
        raise StepConfigError(
            f"{name_of(perturbation)} returned a {type(made).__name__}; expected a dict of tensors."
        )
    lines = [f"{name}: missing" for name in gradients if name not in made]
    lines += [f"{name}: no parameter with a gradient" for name in made if name not in gradients]
    lines += [
        f"{name}: {_described(made[name])}, expected {_described(gradient)}"
        for name, gradient in gradients.items()
        if name in made and _described(made[name]) != _described(gradient)
    ]
    if lines:
        raise StepConfigError(
            f"{name_of(perturbation)} did not return one eps for each gradient: "
            f"{'; '.join(lines[:4])}."
        )
    return {name: made[name] for name in gradients}


def name_of(perturbation: Perturbation | None) -> str:
    """For the manifest: ``sam``, ``ASAM(eta=0.01)``, ``mine.py's function``."""
    if perturbation is None:
        return "sam"
    if dataclasses.is_dataclass(perturbation):
        return repr(perturbation)
    name = getattr(perturbation, "__qualname__", type(perturbation).__qualname__)
    return f"{getattr(perturbation, '__module__', '')}.{name}"


def _described(value: Any) -> tuple[Sequence[int], Any] | str:
    return (list(value.shape), value.dtype) if isinstance(value, Tensor) else type(value).__name__
