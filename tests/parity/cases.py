"""Small models and batches for the harness's tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sam_export as sx

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
RHO = 0.05


class MLP(nn.Module):
    """Two hidden layers of one width, and a frozen scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 12)
        self.b = nn.Linear(12, 12)
        self.c = nn.Linear(12, 5)
        self.scale = nn.Parameter(torch.full((12,), 1.5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``x`` [batch, 12]."""
        h = torch.tanh(self.a(x * self.scale))
        return self.c(torch.relu(self.b(h)))


class ConvNet(nn.Module):
    """Convolutions with a bias before BatchNorm (its true gradient is zero), and max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, stride=2)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)
        self.shift = nn.Parameter(torch.full((6,), 0.1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``x`` [batch, 2, 8, 8]."""
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 2)
        x = torch.relu(self.bn2(self.conv2(x))).amax(dim=(2, 3))
        return self.fc(x + self.shift)


def step_of(
    kind: str, dtype: str, seed: int = 0, optimizer: str = "sgd", **semantics: object
) -> sx.TrainStep:
    """A SAM step over an ``mlp`` or a ``conv`` net."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = {"mlp": MLP, "conv": ConvNet}[kind]().to(getattr(torch, dtype))
    if optimizer == "sgd":
        sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=RHO, **HYPER)
    else:
        sam = sx.SAM(model.parameters(), getattr(torch.optim, optimizer), rho=RHO, lr=1e-2)
    chosen = sx.Semantics(**semantics)  # type: ignore[arg-type]
    return sx.TrainStep(model, nn.CrossEntropyLoss(), sam, semantics=chosen)


def batches_for(
    kind: str, dtype: str, sizes: tuple[int, ...] = (16, 16, 7), seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Random batches of these sizes."""
    generator = torch.Generator().manual_seed(1000 + seed)
    shape = (12,) if kind == "mlp" else (2, 8, 8)
    return [
        (
            torch.randn(size, *shape, generator=generator, dtype=torch.float64).to(
                getattr(torch, dtype)
            ),
            torch.randint(5, (size,), generator=generator),
        )
        for size in sizes
    ]
