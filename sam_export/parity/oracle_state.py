"""The state of an oracle by name. It imports nothing of this package but other oracle files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sam_export.parity.oracle_average import OracleAverage
from sam_export.parity.oracle_batch import Batch, moved
from sam_export.parity.oracle_precision import OraclePrecision
from sam_export.parity.oracle_slots import OracleSlots, host_copy
from sam_export.parity.oracle_variants import OracleVariant


class OracleState:
    """What an oracle holds, read and written as arrays; and where it lives."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    seed: int
    step_count: int
    every: int
    is_counting: bool
    is_double: bool
    stages: dict[str, Tensor]
    variant: OracleVariant
    average: OracleAverage
    precision: OraclePrecision
    _slots: OracleSlots

    @property
    def parameter_names(self) -> list[str]:
        """Names of all parameters, frozen ones included; a tied one under its first name."""
        return [name for name, _ in self.model.named_parameters()]

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """Copies of parameters and buffers by torch's names, and slots as ``slot.<key>.<name>``.

        Raises:
            TypeError: The optimizer keeps something else than tensors and numbers.
        """
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        state = {name: host_copy(value) for name, value in named.items()}
        if self.is_counting:
            state["rng.seed"] = np.array(self.seed)
        if self.is_counting or self.every > 1:
            state["counter.step"] = np.array(self.step_count)
        state |= self.variant.snapshot() | self.average.snapshot()
        state |= self.precision.snapshot()
        state |= {f"stage.{name}": host_copy(value) for name, value in self.stages.items()}
        return state | self._slots.snapshot(self.model, self.optimizer)

    @torch.no_grad()
    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """The inverse of `snapshot`; a slot that is not in ``state`` is one not made yet."""
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, tensor in named.items():
            tensor.copy_(torch.tensor(state[name]))
        if self.is_counting:
            self.seed = int(state["rng.seed"])
        if self.is_counting or self.every > 1:
            self.step_count = int(state["counter.step"])
        self.variant.load(state, self.device, self.is_double)
        self.average.load(state, self.device, self.is_double)
        self.precision.load(state)
        self._slots.load(self.model, self.optimizer, state, self.is_double)

    @property
    def device(self) -> torch.device:
        """Where the first parameter lives; batches are moved there."""
        return next(self.model.parameters()).device

    def tensors(self, batch: Batch) -> Batch:
        """The batch on the model's device and, for the judge, in float64."""

        return moved(batch, self.device, self.is_double)

    def _without_gradient(self) -> set[str]:
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        named = self.model.named_parameters()
        return {name for name, p in named if p.grad is None or id(p) not in held}
