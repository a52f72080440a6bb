"""The SAM step of the recipes, with its base optimizer by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import sam_export as sx

BASE_OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}),
    "nesterov": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
    ),
    "adam": (torch.optim.Adam, {"lr": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3}),
}
"""Name to class and default keyword arguments."""


def cross_entropy_step(
    model: nn.Module, optimizer: str, rho: float, lr: float | None
) -> sx.TrainStep:
    """The SAM step of ``model`` under mean cross-entropy, all parameters in one group.

    Args:
        model: The model to train; it returns logits.
        optimizer: A key of `BASE_OPTIMIZERS`.
        rho: Radius of the perturbation.
        lr: Learning rate; None takes the default of that optimizer.

    Raises:
        ValueError: No base optimizer of that name.
    """
    return sam_step(model, nn.CrossEntropyLoss(), optimizer, rho, lr)


def sam_step(
    model: nn.Module, loss_fn: Any, optimizer: str, rho: float, lr: float | None
) -> sx.TrainStep:
    """The SAM step of ``model`` under any loss, all parameters in one group.

    Args:
        model: The model to train.
        loss_fn: ``loss_fn(output, target)``.
        optimizer: A key of `BASE_OPTIMIZERS`.
        rho: Radius of the perturbation.
        lr: Learning rate; None takes the default of that optimizer.

    Raises:
        ValueError: No base optimizer of that name.
    """
    if optimizer not in BASE_OPTIMIZERS:
        raise ValueError(
            f"optimizer={optimizer!r}: expected one of {', '.join(sorted(BASE_OPTIMIZERS))}."
        )
    base_cls, defaults = BASE_OPTIMIZERS[optimizer]
    kwargs = defaults if lr is None else {**defaults, "lr": lr}
    sam = sx.SAM(model.parameters(), base_cls, rho=rho, **kwargs)
    return sx.TrainStep(model, loss_fn, sam)
