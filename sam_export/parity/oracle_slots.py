"""The optimizer state of the oracle, by name. It imports nothing of this package, on purpose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class OracleSlots:
    """State of a stock optimizer over a model's parameters, as ``slot.<key>.<parameter>``."""

    def __init__(self) -> None:
        self._numbers: dict[str, type] = {}
        """Slots that the optimizer keeps as Python numbers, and of which type."""

    def snapshot(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> dict[str, NDArray[Any]]:
        """Copies, on the host; a number as float64.

        Raises:
            TypeError: The optimizer keeps something else than tensors and numbers.
        """
        state = {}
        for name, p in model.named_parameters():
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    state[f"slot.{key}.{name}"] = host_copy(value)
                elif _is_number(value):
                    state[f"slot.{key}.{name}"] = np.array(value, np.float64)
                elif value is not None:
                    raise TypeError(f"state[{key!r}] of {name!r} is a {type(value).__name__}")
        return state

    def load(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, NDArray[Any]],
        double: bool,
    ) -> None:
        """The inverse; what is not in ``state`` is not made yet.

        Args:
            model: Whose parameters.
            optimizer: Over them.
            state: By name; what is no slot is passed over.
            double: Whether slots become float64.
        """
        for name, p in model.named_parameters():
            entries = optimizer.state.pop(p, {})
            self._numbers |= {key: type(v) for key, v in entries.items() if _is_number(v)}
            kept: dict[str, Any] = {key: None for key, v in entries.items() if v is None}
            for full, array in state.items():
                key = full[len("slot.") : -len(name) - 1]
                if full == f"slot.{key}.{name}" and "." not in key:
                    value = torch.tensor(array)
                    if double and value.is_floating_point():
                        value = value.double()
                    # torch.optim keeps its step counters on the CPU, wherever the parameter lives.
                    kept[key] = value if key == "step" else value.to(p.device)
                    if key in self._numbers:
                        kept[key] = self._numbers[key](value.item())
            if any(value is not None for value in kept.values()):
                optimizer.state[p] = kept


def host_copy(value: Tensor) -> NDArray[Any]:
    """A tensor as an array of its own."""
    array: NDArray[Any] = value.detach().cpu().numpy().copy()
    return array


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
