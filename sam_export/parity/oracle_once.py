"""Single passes of the oracle, for the laws. It imports nothing of this package but the oracle."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from sam_export.parity.oracle import Oracle
from sam_export.parity.oracle_batch import Batch
from sam_export.parity.oracle_slots import host_copy


def base_step(oracle: Oracle, batch: Batch) -> None:
    """One step of the base optimizer alone: one pass, no perturbation."""
    oracle.gradient(oracle.tensors(batch))
    oracle.optimizer.step()
    oracle.zero_grad()


def loss_and_gradient(oracle: Oracle, batch: Batch) -> tuple[float, dict[str, NDArray[Any]]]:
    """Loss and gradient at the current weights, by name; buffers are put back."""
    buffers = list(oracle.model.buffers())
    before = [buffer.clone() for buffer in buffers]
    loss = oracle.gradient(oracle.tensors(batch))
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
    held = {id(p) for group in oracle.optimizer.param_groups for p in group["params"]}
    gradient = {
        name: host_copy(p.grad)
        for name, p in oracle.model.named_parameters()
        if p.grad is not None and id(p) in held
    }
    oracle.zero_grad()
    return float(loss.detach()), gradient
