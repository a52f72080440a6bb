"""Schedules of `lr` and `rho` drive a session as they drive eager; nothing is compiled again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import sam_export as sx

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.3),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=5),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.2, total_steps=8, cycle_momentum=False
    ),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(
        optimizer, [lambda step: 1 / (1 + step), lambda step: 0.5**step]
    ),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 2), lr_scheduler.ExponentialLR(optimizer, 0.7)],
        milestones=[2],
    ),
}


def train_step() -> sx.TrainStep:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    groups = [
        {"params": list(model[0].parameters())},
        {"params": list(model[2].parameters()), "lr": 0.02, "rho": 0.02},
    ]
    sam = sx.SAM(groups, torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    return sx.TrainStep(model, nn.CrossEntropyLoss(), sam)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(10, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (10,), generator=generator),
        )
        for _ in range(6)
    ]


def follow(step: sx.TrainStep, name: str, take: Callable[[Any, Any], None]) -> None:
    """Trains with a schedule of torch for ``lr``, and ``rho`` going with it."""
    schedule = SCHEDULES[name](step.optimizer)
    first = [(group["lr"], group["rho"]) for group in step.optimizer.param_groups]
    for x, y in batches():
        for group, (lr, rho) in zip(step.optimizer.param_groups, first, strict=True):
            group["rho"] = rho * group["lr"] / lr
        take(x, y)
        step.optimizer._opt_called = True  # the session steps in its place
        schedule.step()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_of_torch_drives_a_session(name: str) -> None:
    eager, driver = train_step(), train_step()
    session = sx.load(sx.capture(driver, batches()[0]), target="torchscript")
    follow(eager, name, lambda x, y: eager(x, y))
    rates = []

    def take(x: Any, y: Any) -> None:
        rates.append(driver.hyper()["lr"])
        session.step(x, y, **driver.hyper())

    follow(driver, name, take)
    assert len({tuple(rate) for rate in rates}) > 2  # it is one that changes
    state = session.state
    for parameter, value in eager.model.named_parameters():
        torch.testing.assert_close(
            torch.tensor(state[parameter]), value.detach(), atol=1e-13, rtol=0
        )


def test_torch_compile_compiles_once_whatever_lr_and_rho_are() -> None:
    session = sx.load(sx.capture(train_step(), batches()[0]), target="torch-compile")
    x, y = batches()[0]
    session.step(x, y)
    compiled = dict(torch._dynamo.utils.counters["stats"])
    with torch.compiler.set_stance("fail_on_recompile"):
        for index, (x, y) in enumerate(batches()):
            session.step(x, y, lr=[0.1 / (1 + index), 0.3], rho=0.01 * index)
    assert dict(torch._dynamo.utils.counters["stats"]) == compiled
    assert compiled["unique_graphs"] >= 1


def test_onnx_runtime_opens_one_session_whatever_lr_and_rho_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnxruntime

    opened = []
    right = onnxruntime.InferenceSession

    def counted(*given: Any, **options: Any) -> Any:
        opened.append(given)
        return right(*given, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", counted)
    session = sx.load(sx.capture(train_step(), batches()[0]), target="onnx")
    for index, (x, y) in enumerate(batches()):
        session.step(x, y, lr=[0.1 / (1 + index), 0.3], rho=0.01 * index)
    assert len(opened) == 1
