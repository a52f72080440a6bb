"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sam_export.errors import StepConfigError
from sam_export.step.variants.variant import checked_number


@dataclass(frozen=True)
class EMA:
    r"""An average of the weights over the steps, kept beside them; training does not see it.

    After each step that updates, of every trained parameter and of every buffer of a floating
    dtype, from ``m_0 = w_0`` on::

        m_t = m_(t-1) + (1 - decay) * (w_t - m_(t-1))

    BatchNorm's statistics belong to the weights that made them, so the averaged weights go with
    averaged statistics (``buffers="average"``). Buffers of other dtypes are the current ones.

    Args:
        decay: How much of the average stays, from 0 to 1: with 0 it is ``w_t``, with 1 ``w_0``.
        buffers: ``"average"``, or ``"copy"``: the current ones, as `torch.optim.swa_utils.
            AveragedModel` has them by default.

    Raises:
        StepConfigError: ``decay`` is out of its range, or ``buffers`` is something else.

    Source: Polyak, Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992,
        https://doi.org/10.1137/0330046; the exponential form: Tarvainen, Valpola, "Mean teachers
        are better role models", 2017, https://arxiv.org/abs/1703.01780.
    """

    decay: float = 0.999
    buffers: Literal["average", "copy"] = "average"

    def __post_init__(self) -> None:
        checked_number("EMA", "decay", self.decay, 0, 1)
        if self.buffers not in ("average", "copy"):
            raise StepConfigError(f"EMA(buffers={self.buffers!r}): expected 'average' or 'copy'.")

    def first(self, model: nn.Module, trained: Iterable[str]) -> dict[str, Tensor]:
        """The average before the first step, by name: copies of what the model has."""
        named = dict(model.named_parameters())
        averaged: dict[str, Tensor] = {name: named[name] for name in trained}
        if self.buffers == "average":
            averaged |= {
                name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()
            }
        return {name: value.detach().clone() for name, value in averaged.items()}

    def after(self, averages: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The average after a step that made ``now``; pure."""
        return {
            name: average + (now[name].detach() - average) * (1 - self.decay)
            for name, average in averages.items()
        }


def check_ema(ema: object) -> None:
    """Refuses what is no `EMA`: `StepConfigError`."""
    if ema is not None and not isinstance(ema, EMA):
        raise StepConfigError(f"ema={ema!r}: expected EMA(decay=0.999), or None.")


@torch.no_grad()
def load_averages(averages: Mapping[str, Tensor], model: nn.Module) -> None:
    """Copies averaged weights and buffers into a model of the same kind."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in averages.items():
        named[name].copy_(value)
