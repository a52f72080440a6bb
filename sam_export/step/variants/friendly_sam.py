"""Friendly SAM (F-SAM)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sam_export.step.variants.variant import (
    Gradients,
    Memory,
    Variant,
    checked_number,
    remembered,
    with_remembered,
)

_KEY = "average"


@dataclass(frozen=True)
class FriendlySAM(Variant):
    r"""SAM that perturbs along the batch's own noise: without the full gradient's part.

    The full gradient is estimated by an average over the steps, ``m``, kept for each parameter::

        d_t     = g_t - sigma * m_(t-1)                       # d_1 = g_1
        m_t     = lmbda * m_(t-1) + (1 - lmbda) * g_t         # m_1 = g_1
        eps_w   = rho * d_t / (||d_t|| + 1e-12)

    As in the authors' code, the average of the steps before is subtracted. With ``sigma = 0`` it
    is SAM.

    Args:
        sigma: How much of the average is taken away, at least 0.
        lmbda: How much of the average stays at each step, from 0 to 1.

    Raises:
        StepConfigError: One of them is out of its range.

    Source: Li, Zhou, He, Cheng, Huang, "Friendly Sharpness-Aware Minimization", 2024,
        https://arxiv.org/abs/2403.12350, algorithm 1.
    """

    sigma: float = 1.0
    lmbda: float = 0.9

    keys: ClassVar[tuple[str, ...]] = (_KEY,)
    starts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checked_number("FriendlySAM", "sigma", self.sigma, 0, math.inf)
        checked_number("FriendlySAM", "lmbda", self.lmbda, 0, 1)

    def ascended(
        self, gradients: Gradients, memory: Memory, started: Tensor | None
    ) -> tuple[dict[str, Tensor], Memory]:
        """``d`` by name, and the new average."""
        assert started is not None
        is_first = started == 0
        averages = remembered(memory, _KEY, list(gradients))
        # Before the first step the average is 0, so that d is g.
        directions = {name: g - self.sigma * averages[name] for name, g in gradients.items()}
        new = {
            name: torch.where(is_first, g, self.lmbda * averages[name] + (1 - self.lmbda) * g)
            for name, g in gradients.items()
        }
        return directions, with_remembered(memory, _KEY, new)
