"""Programs that use the stock training classes of ONNX Runtime, and the eager loop they equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sam_export as sx
from tests.runtime.target_cases import images

Artifacts = Callable[[str], Path]

RHO = 0.05
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], str, str]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}, "gradient", "SGDOptimizerV2"),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.05}, "gradient", "AdamWOptimizer"),
    "adam": (torch.optim.Adam, {"lr": 0.01}, "gradient", "AdamWOptimizer"),
    "momentum": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        "direction",
        "SGDOptimizerV2",
    ),
    "decayed adam": (
        torch.optim.Adam,
        {"lr": 0.01, "weight_decay": 0.05},
        "direction",
        "SGDOptimizerV2",
    ),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}, "direction", "SGDOptimizerV2"),
}
"""Name to class, options, what the gradient buffers hold, and the operator of the optimizer."""


class Net(nn.Module):
    """BatchNorm and max pooling; nothing whose gradient is zero but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x)))
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


def made(name: str, **semantics: Any) -> sx.TrainStep:
    torch.manual_seed(0)
    model = Net()
    kind, options, *_ = OPTIMIZERS[name]
    sam = sx.SAM(model.parameters(), kind, rho=RHO, **options)
    return sx.TrainStep(model, nn.CrossEntropyLoss(), sam, semantics=sx.Semantics(**semantics))


def exported(step: sx.TrainStep, folder: Path) -> sx.Artifact:
    captured = sx.capture(step, images(6, torch.float32))
    return sx.export(captured, folder, target="ort-artifacts")


def opened(folder: Path, checkpoint: Path | None = None) -> tuple[Any, Any, Any]:
    """State, module and optimizer as a training program opens them."""
    from onnxruntime.training import api

    state = api.CheckpointState.load_checkpoint(checkpoint or folder / "checkpoint")
    module = api.Module(folder / "training_model.onnx", state, folder / "eval_model.onnx")
    return state, module, api.Optimizer(folder / "optimizer_model.onnx", module)


def train(opened: tuple[Any, Any, Any], batches: Sequence[Any], lr: float) -> list[float]:
    """The loop of any program that uses the API."""
    _, module, optimizer = opened
    optimizer.set_learning_rate(lr)
    losses = []
    for x, y in batches:
        loss, *_ = module(x.numpy(), y.numpy())
        optimizer.step()
        module.lazy_reset_grad()
        losses.append(float(loss))
    return losses


def eager(
    model: nn.Module, base: torch.optim.Optimizer, batches: Sequence[Any], rho: float = RHO
) -> list[float]:
    """SAM over a stock optimizer; running statistics count the first pass only."""
    parameters = list(model.parameters())
    losses = []
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        buffers = [b.clone() for b in model.buffers()]
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.add_(g * (rho / (norm + 1e-12)))
        base.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)
            for b, old in zip(model.buffers(), buffers, strict=True):
                b.copy_(old)
        base.step()
        losses.append(float(loss.detach()))
    return losses


def assert_equal_to_eager(state: Any, model: nn.Module, before: dict[str, Tensor]) -> None:
    """Relative to the change of a tensor; float32 rounding over the steps (seen: 4e-6 or less)."""
    for name, value in model.state_dict().items():
        found = np.asarray(state.parameters[name].data, np.float64)
        moved = float((value - before[name]).double().norm())
        error = float(np.linalg.norm(found - value.double().numpy()))
        assert moved > 0, name
        assert error <= 5e-5 * moved, (name, error / moved)


BATCHES = [images(count, torch.float32, seed) for seed, count in enumerate((6, 6, 9, 4) * 5)]
