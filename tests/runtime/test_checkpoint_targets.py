"""A run that changes hands in the middle is the run that nobody interrupted, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export.runtime.detect import target_status
from sam_export.runtime.session import Session

RHO = 0.05

LRS = (0.05, 0.02, 0.02, 0.02, 0.03, 0.03, 0.01, 0.01)
"""Learning rate of each step; one is passed only where it differs from the last step's."""

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.05, "amsgrad": True}),
    "nadam": (torch.optim.NAdam, {}),
    "adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1}),
}


BOUNDS = dict.fromkeys(OPTIMIZERS, 1e-10) | {"nadam": len(LRS) * 2.0**-24}
"""Relative to the change. Eager's NAdam rounds its product of factors to float32 at each step."""


class Net(nn.Module):
    """No bias before BatchNorm: its gradient would be noise alone, and Adam makes steps of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


def batch(index: int) -> tuple[Tensor, Tensor]:
    """Of a size that changes from step to step."""
    generator = torch.Generator().manual_seed(index)
    count = 6 + index % 3
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=generator)


def make(kind: str, seed: int = 0) -> sx.TrainStep:
    torch.manual_seed(seed)
    model = Net().double()
    base, options = OPTIMIZERS[kind]
    sam = sx.SAM(model.parameters(), base, rho=RHO, lr=LRS[0], **options)
    return sx.TrainStep(model, nn.CrossEntropyLoss(), sam)


def plain_sam(kind: str, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The whole run in plain PyTorch: a stock optimizer and two backpropagations a step."""
    torch.manual_seed(0)
    model = Net().double()
    base, options = OPTIMIZERS[kind]
    optimizer = base(model.parameters(), lr=LRS[0], **options)  # type: ignore[call-arg]
    parameters = list(model.parameters())
    for index in range(steps):
        optimizer.param_groups[0]["lr"] = LRS[index]
        x, y = batch(index)
        loss = nn.functional.cross_entropy(model(x), y)
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.sqrt(sum(((g**2).sum() for g in gradients), torch.tensor(0.0)))
        before = [p.detach().clone() for p in parameters]
        statistics = [b.clone() for b in model.buffers()]
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p += RHO / (norm + 1e-12) * g
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)
            for b, old in zip(model.buffers(), statistics, strict=True):
                b.copy_(old)
        optimizer.step()
    return model, optimizer


def take_steps(run: Session | sx.TrainStep, first: int, last: int) -> None:
    """Steps ``first`` to ``last - 1``; a learning rate that stays comes from the run itself."""
    for index in range(first, last):
        changes = index > 0 and LRS[index] != LRS[index - 1]
        if isinstance(run, Session):
            run.step(*batch(index), **({"lr": LRS[index]} if changes else {}))
        else:
            for group in run.optimizer.param_groups if changes else ():
                group["lr"] = LRS[index]
            run(*batch(index))


def same(step: sx.TrainStep, kind: str, steps: int) -> None:
    """Whether eager stands where the uninterrupted run does, measured by what the run changed."""
    model, optimizer = plain_sam(kind, steps)
    start = make(kind).model.state_dict()
    found, wanted = step.model.state_dict(), model.state_dict()
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        change = float((value - start[name]).double().norm())
        assert float((found[name] - value).double().norm()) <= BOUNDS[kind] * change, name
    mine = step.optimizer.base_optimizer.state
    pairs = zip(step.model.named_parameters(), model.parameters(), strict=True)
    for (name, one), other in pairs:
        assert mine[one].keys() == optimizer.state[other].keys(), name
        for key, value in optimizer.state[other].items():
            got, value = torch.as_tensor(mine[one][key]), torch.as_tensor(value)
            error = float((got - value).double().norm())
            assert error <= BOUNDS[kind] * float(value.double().norm()), (name, key)


def loaded(captured: Any, target: str) -> Session:
    missing = target_status(target).run
    if missing:
        pytest.skip(f"{target} needs {missing[0].what}")
    return sx.load(captured, target=target, threads=1)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("sgd", ("onnx", "torchscript", "onnx")),
        ("adamw", ("onnx", "torchscript", "torch-compile")),
        ("nadam", ("torchscript", "onnx", "torchscript")),
        ("adagrad", ("onnx", "onnx", "torchscript")),
    ],
)
def test_from_target_to_target_and_into_eager(
    kind: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    captured = sx.capture(make(kind), batch(0))
    path = tmp_path / "run.ckpt"
    for place, target in enumerate(targets):
        session = loaded(captured, target)
        if place:
            session.restore(path)
            assert session.step_count == 2 * place
        take_steps(session, 2 * place, 2 * place + 2)
        session.save(path)
    eager = make(kind, seed=1)  # other weights, which are to be replaced
    session.load_into(eager)
    take_steps(eager, 6, 8)
    same(eager, kind, 8)


@pytest.mark.parametrize("first_steps", [0, 1, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_from_an_eager_run_into_a_session(kind: str, first_steps: int, tmp_path: Path) -> None:
    eager = make(kind)
    take_steps(eager, 0, first_steps)
    session = loaded(sx.capture(make(kind, seed=1), batch(0)), "onnx")
    session.load_from(eager)
    take_steps(session, first_steps, 5)
    session.save(tmp_path / "run.ckpt")
    other = loaded(sx.capture(make(kind, seed=2), batch(0)), "torchscript")
    other.restore(tmp_path / "run.ckpt")
    take_steps(other, 5, 7)
    back = make(kind, seed=3)
    other.load_into(back)
    same(back, kind, 7)
    assert np.isclose(back.optimizer.param_groups[0]["lr"], LRS[6])
