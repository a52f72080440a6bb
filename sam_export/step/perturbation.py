"""Perturbations other than ``rho g / ||g||``: what one is, and adaptive SAM."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sam_export.errors import StepConfigError
from sam_export.step.passes import EPSILON, global_norm

Perturbation = Callable[
    [Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]
]
"""``(parameters, gradients, radii) -> eps``, all by name: a pure function of tensors.

``gradients`` has an entry for every parameter that the loss depends on; so must ``eps``, of the
same shapes and dtypes. ``radii`` are the groups' ``rho``, float64 scalars. In a graph all of them
are traced: no branch on a value, nothing read into Python.
"""


@dataclass(frozen=True)
class ASAM:
    r"""Adaptive SAM: the perturbation scales with the weights, elementwise.

    With ``T_i = |w_i| + eta``, elementwise, over all parameters::

        eps_i = rho * T_i^2 * g_i / (sqrt(sum_i ||T_i g_i||^2) + 1e-12)

    Args:
        eta: Added to the magnitudes, at least 0: 0.01 in the paper, 0 in the common PyTorch code.
            With 0 a weight that is 0 is not perturbed.

    Raises:
        StepConfigError: ``eta`` is negative or not a finite number.

    Source: Kwon, Kim, Park, Choi, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
        Learning of Deep Neural Networks", 2021, https://arxiv.org/abs/2102.11600, eq. 11.
    """

    eta: float = 0.01

    def __post_init__(self) -> None:
        is_number = isinstance(self.eta, (int, float)) and not isinstance(self.eta, bool)
        if not is_number or not math.isfinite(self.eta) or self.eta < 0:
            raise StepConfigError(f"ASAM(eta={self.eta!r}): expected a finite number, at least 0.")

    def __call__(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        radii: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """``eps`` by name."""
        scales = {name: parameters[name].abs() + self.eta for name in gradients}
        scaled = {name: scales[name] * gradient for name, gradient in gradients.items()}
        norm = global_norm(list(scaled.values()))
        return {
            name: scales[name] * value * (radii[name] / (norm + EPSILON)).to(value)
            for name, value in scaled.items()
        }


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
    if isinstance(perturbation, ASAM):
        return repr(perturbation)
    name = getattr(perturbation, "__qualname__", type(perturbation).__qualname__)
    return f"{getattr(perturbation, '__module__', '')}.{name}"


def _described(value: Any) -> tuple[Sequence[int], Any] | str:
    return (list(value.shape), value.dtype) if isinstance(value, Tensor) else type(value).__name__
