"""Batches of the oracle, and the loss of one. It imports nothing of this package, on purpose."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Batch = Sequence[Any] | Mapping[str, Any]


def loss_of(
    model: nn.Module, loss_fn: Callable[..., Tensor] | None, num_targets: int, batch: Batch
) -> Tensor:
    """The loss of a tuple (inputs, then targets) or of a dict (inputs by ``forward``'s names)."""
    count = len(batch) - (num_targets if loss_fn is not None else 0)
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        inputs = list(batch)[:count] if takes_any else [key for key in batch if key in parameters]
        output = model(**{key: batch[key] for key in inputs})
        targets = [value for key, value in batch.items() if key not in inputs]
    else:
        output = model(*batch[:count])
        targets = list(batch[count:])
    loss: Tensor = output if loss_fn is None else loss_fn(output, *targets)
    return loss


def moved(batch: Batch, device: torch.device, double: bool) -> Batch:
    """The batch as tensors on a device, floats in float64 where asked for."""

    def one(value: Any) -> Tensor:
        tensor = value if isinstance(value, Tensor) else torch.tensor(np.asarray(value))
        tensor = tensor.detach().to(device)
        return tensor.double() if double and tensor.is_floating_point() else tensor

    if isinstance(batch, Mapping):
        return {key: one(value) for key, value in batch.items()}
    return [one(value) for value in batch]
