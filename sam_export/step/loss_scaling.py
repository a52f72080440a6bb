"""Dynamic loss scaling as state of the step: the scale, and how many steps it has been right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sam_export.artifact.loss_scaling import LossScaling


@dataclass(frozen=True)
class Scaler:
    """The scale of one step, and what it is in the next.

    A scalar is read nowhere, so a graph that holds it does not wait for the host.

    Attributes:
        settings: Factors and interval.
        scale: float32 scalar.
        growth_tracker: int64 scalar: steps without an overflow since the scale last changed.
    """

    settings: LossScaling
    scale: Tensor
    growth_tracker: Tensor

    @property
    def shown(self) -> Tensor:
        """The scale as a result of the step: float64, a value of its own beside the state."""
        return self.scale.double()

    def scaled(self, loss: Tensor) -> Tensor:
        """``loss * scale``."""
        return loss * self.scale

    def inverse(self) -> Tensor:
        """``1 / scale``, rounded once to float32, as `torch.amp.GradScaler` has it."""
        return self.shown.reciprocal().float()

    def after(self, finite: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and tracker of the next step.

        In the order of computation, products in float64, ``scale`` rounded to float32::

            tracker = tracker + 1
            if not finite:            scale, tracker = scale * backoff_factor, 0
            elif tracker == interval: scale, tracker = scale * growth_factor, 0   # if finite

        Args:
            finite: Scalar bool: neither pass overflowed.

        Source: `torch._amp_update_scale_`, by what it computes.
        """
        count = self.growth_tracker + 1
        is_due = count == self.settings.growth_interval
        grown = (self.shown * self.settings.growth_factor).float()
        grown = torch.where(is_due & torch.isfinite(grown), grown, self.scale)
        lowered = (self.shown * self.settings.backoff_factor).float()
        scale = torch.where(finite, grown, lowered)
        tracker = torch.where(finite & ~is_due, count, torch.zeros_like(count))
        return scale, tracker
