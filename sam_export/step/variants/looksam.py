"""LookSAM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sam_export.step.norms import EPSILON, global_norm
from sam_export.step.variants.variant import (
    Gradients,
    Memory,
    Variant,
    checked_number,
    inner,
    remembered,
    with_remembered,
)

_KEY = "flattening"


@dataclass(frozen=True)
class LookSAM(Variant):
    r"""Periodic SAM whose plain steps use again what the last SAM step found.

    For ``SAM(..., every=k)``. A SAM step keeps the part of ``g_adv`` that is orthogonal to ``g``,
    and the plain steps after it add it, as long as their own gradient. Norms and products are over
    all parameters::

        every k-th step:   u   = g / (||g|| + 1e-12)
                           g_v = g_adv - <g_adv, u> u
                           update with g_adv
        between:           update with g + alpha * (||g|| / (||g_v|| + 1e-12)) * g_v

    With ``alpha = 0`` it is periodic SAM.

    Args:
        alpha: Length of what is added, in gradients' lengths, at least 0.

    Raises:
        StepConfigError: ``alpha`` is negative or not a finite number.

    Source: Liu, Mai, Chen, Hsieh, You, "Towards Efficient and Scalable Sharpness-Aware
        Minimization", 2022, https://arxiv.org/abs/2203.02714, algorithm 1.
    """

    alpha: float = 0.7

    keys: ClassVar[tuple[str, ...]] = (_KEY,)

    def __post_init__(self) -> None:
        checked_number("LookSAM", "alpha", self.alpha, 0, math.inf)

    def descended(
        self, gradients: Gradients, perturbed: Gradients, memory: Memory
    ) -> tuple[Gradients, Memory]:
        """``g_adv`` as it is, and ``g_v`` to remember."""
        norm = global_norm(list(gradients.values())) + EPSILON
        unit = {name: value / norm.to(value) for name, value in gradients.items()}
        along = inner(perturbed, unit)
        kept = {name: value - along.to(value) * unit[name] for name, value in perturbed.items()}
        return perturbed, with_remembered(memory, _KEY, kept)

    def between(self, gradients: Gradients, memory: Memory) -> dict[str, Tensor]:
        """``g`` with the remembered part added."""
        kept = remembered(memory, _KEY, list(gradients))
        scale = global_norm(list(gradients.values())) / (global_norm(list(kept.values())) + EPSILON)
        return {
            name: value + (self.alpha * scale).to(value) * kept[name]
            for name, value in gradients.items()
        }
