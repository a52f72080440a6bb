"""Small steps in mixed precision, for the tests of the targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import sam_export as sx

SCALING = sx.LossScaling(init_scale=1024.0, growth_interval=3)


class Small(nn.Module):
    """Linear layers, BatchNorm and dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(torch.tanh(self.norm(self.first(x)))))


def step_of(
    model: nn.Module | None = None,
    autocast: torch.dtype | None = torch.float16,
    scaling: sx.LossScaling | None = SCALING,
    **options: Any,
) -> sx.TrainStep:
    torch.manual_seed(0)
    model = model or Small()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    loss = nn.CrossEntropyLoss()
    return sx.TrainStep(model, loss, sam, autocast=autocast, loss_scaling=scaling, **options)


def batch(seed: int = 0, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator)
    return x, torch.randint(3, (size,), generator=generator)
