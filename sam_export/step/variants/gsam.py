"""Surrogate Gap guided SAM (GSAM)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from sam_export.errors import StepConfigError
from sam_export.step.norms import EPSILON, global_norm
from sam_export.step.variants.variant import Gradients, Memory, Variant, checked_number, inner


@dataclass(frozen=True)
class GSAM(Variant):
    r"""SAM that also closes the surrogate gap ``L(w + eps_w) - L(w)``.

    The part of the gradient at ``w`` that is orthogonal to the perturbed one is ascended, which
    leaves the perturbed loss as it is to first order. Norms and products are over all parameters::

        u       = g_adv / (||g_adv|| + 1e-12)
        g_perp  = g - <g, u> u
        g_adv'  = g_adv - alpha * g_perp          # what the base optimizer gets

    With ``alpha = 0`` it is SAM. In the paper ``rho`` follows the learning rate; see `radius`.

    Args:
        alpha: Weight of the orthogonal part, at least 0.

    Raises:
        StepConfigError: ``alpha`` is negative or not a finite number.

    Source: Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan, Liu, "Surrogate Gap
        Minimization Improves Sharpness-Aware Training", 2022, https://arxiv.org/abs/2203.08065,
        algorithm 1.
    """

    alpha: float = 0.4

    def __post_init__(self) -> None:
        checked_number("GSAM", "alpha", self.alpha, 0, math.inf)

    def descended(
        self, gradients: Gradients, perturbed: Gradients, memory: Memory
    ) -> tuple[dict[str, Tensor], Memory]:
        """``g_adv'`` by name."""
        norm = global_norm(list(perturbed.values())) + EPSILON
        unit = {name: value / norm.to(value) for name, value in perturbed.items()}
        along = inner(gradients, unit)
        return {
            name: value - self.alpha * (gradients[name] - along.to(value) * unit[name])
            for name, value in perturbed.items()
        }, memory

    @staticmethod
    def radius(lr: float, *, lr_max: float, lr_min: float, rho_max: float, rho_min: float) -> float:
        """The paper's radius for a learning rate, to be given to each step.

        ``rho = rho_min + (rho_max - rho_min) * (lr - lr_min) / (lr_max - lr_min)``

        Raises:
            StepConfigError: ``lr_max`` is not above ``lr_min``.

        Source: the same.
        """
        if not lr_max > lr_min:
            raise StepConfigError(
                f"GSAM.radius(lr_max={lr_max!r}, lr_min={lr_min!r}): lr_max must be above lr_min."
            )
        return rho_min + (rho_max - rho_min) * (lr - lr_min) / (lr_max - lr_min)
