"""Adaptive SAM (ASAM)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sam_export.step.norms import EPSILON, global_norm
from sam_export.step.variants.variant import checked_number


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
        checked_number("ASAM", "eta", self.eta, 0, math.inf)

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
