"""The average of the weights that the oracle keeps. It imports nothing of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class OracleAverage:
    """``m = decay * m + (1 - decay) * w`` after each step, for the tensors that it starts with.

    Args:
        decay: How much of it stays.
        start: Averages by name of the parameter or buffer; none: there is nothing to keep.
    """

    def __init__(self, decay: float = 0.0, start: Mapping[str, Tensor] | None = None) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in (start or {}).items()}

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Takes the model's weights into it."""
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, value in self.values.items():
            self.values[name] = self.decay * value + (1 - self.decay) * named[name]

    def double(self) -> None:
        """Goes on in float64."""
        self.values = {name: value.double() for name, value in self.values.items()}

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """The averages as ``average.<name>``."""
        return {
            f"average.{name}": value.cpu().numpy().copy() for name, value in self.values.items()
        }

    def load(self, state: Mapping[str, NDArray[Any]], device: torch.device, double: bool) -> None:
        """The inverse."""
        for name in self.values:
            value = torch.tensor(state[f"average.{name}"], device=device)
            self.values[name] = value.double() if double else value
