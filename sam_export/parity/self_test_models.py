"""The two small models that the faults of the self-test are put into, and their batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sam_export.parity.mutants import ModelName
from sam_export.step.sam import SAM
from sam_export.step.train_step import TrainStep

SIZES = (16, 16, 12, 7)
"""Examples of each batch."""

NOT_FINITE = 2
"""The batch that has a NaN in it, so that what a step does then is tested, too."""

_CLASSES = 5


class ConvNet(nn.Module):
    """Two convolutions with BatchNorm, and a frozen parameter.

    ``conv1`` has a bias, whose gradient is rounding noise: BatchNorm takes the mean away.

    The mean over the pixels gives each of an example's pixels the same gradient, so the roundings
    of a loop that sums it add up (`one_by_one`): the right step of a compiled target must pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, _CLASSES)
        self.shift = nn.Parameter(torch.full((4,), 0.1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``x`` [batch, 2, 8, 8]."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x))).mean(dim=(2, 3))
        logits: Tensor = self.fc(x + self.shift)
        return logits


class MLP(nn.Module):
    """Three layers with dropout, two of one shape, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 12)
        self.b = nn.Linear(12, 12)
        self.c = nn.Linear(12, _CLASSES)
        self.dropout = nn.Dropout(0.2)
        self.scale = nn.Parameter(torch.full((12,), 1.5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``x`` [batch, 12]."""
        x = self.dropout(torch.tanh(self.a(x * self.scale)))
        logits: Tensor = self.c(torch.tanh(self.b(x)))
        return logits


def step_of(kind: ModelName) -> TrainStep:
    """A right step: SGD with momentum and decay, or AdamW with two parameter groups."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ConvNet() if kind == "conv" else MLP()
    if isinstance(model, ConvNet):
        optimizer = SAM(
            model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9, weight_decay=1e-2
        )
    else:
        rest = [*model.b.parameters(), *model.c.parameters(), model.scale]
        groups = [
            {"params": model.a.parameters(), "rho": 0.05, "lr": 1e-2, "weight_decay": 0.05},
            {"params": rest, "rho": 0.1, "lr": 3e-3, "weight_decay": 0.0},
        ]
        optimizer = SAM(groups, torch.optim.AdamW)
    return TrainStep(model, nn.CrossEntropyLoss(), optimizer, seed=1)


def batches_of(kind: ModelName) -> Sequence[tuple[Tensor, Tensor]]:
    """Random batches of several sizes; one is not finite."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, 8, 8) if kind == "conv" else (12,)
    batches = []
    for index, size in enumerate(SIZES):
        x = torch.randn(size, *shape, generator=generator)
        if index == NOT_FINITE:
            x.view(-1)[0] = torch.nan
        batches.append((x, torch.randint(_CLASSES, (size,), generator=generator)))
    return batches
