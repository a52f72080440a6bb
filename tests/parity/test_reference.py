"""``reference=``: the eager loop that a user runs today, and the choice in which it differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export.parity.reference import ReferenceResult
from tests.parity.cases import HYPER, RHO, batches_for, step_of
from tests.parity.loops import PlainLoop


def loop(
    *,
    stats_twice: bool = True,
    decay_in_ascent: bool = False,
    per_tensor: bool = False,
    perturbs: bool = True,
    returns_second: bool = False,
    sign: float = 1.0,
) -> Callable[[nn.Module, torch.optim.Optimizer], Callable[[Tensor, Tensor], Tensor]]:
    """A loop as found on the web, with what differs between them."""

    def make(
        model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Callable[[Tensor, Tensor], Tensor]:
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            (group,) = optimizer.param_groups
            held = [p for p in group["params"] if p.grad is not None]
            with torch.no_grad():
                grads = [
                    p.grad + (group["weight_decay"] * p if decay_in_ascent else 0) for p in held
                ]
                total = torch.stack([g.norm() for g in grads]).norm()
                steps = [
                    sign * perturbs * group["rho"] * g / (g.norm() if per_tensor else total)
                    for g in grads
                ]
                before = [p.clone() for p in held]
                for p, e in zip(held, steps, strict=True):
                    p.add_(e)
            optimizer.zero_grad()
            kept = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]
            counts = [m.num_batches_tracked.clone() for m in norms]
            second = nn.functional.cross_entropy(model(x), y)
            second.backward()
            with torch.no_grad():
                if not stats_twice:
                    for m, (mean, var), count in zip(norms, kept, counts, strict=True):
                        m.running_mean.copy_(mean)
                        m.running_var.copy_(var)
                        m.num_batches_tracked.copy_(count)
                for p, old in zip(held, before, strict=True):
                    p.copy_(old)
            optimizer.step()
            return (second if returns_second else loss).detach()

        return step

    return make


def compared(made: Any, dtype: str = "float32") -> ReferenceResult:
    step = step_of("conv", dtype)
    session = PlainLoop(step.model, RHO, **HYPER)
    report = sx.check_parity(
        step,
        batches_for("conv", dtype),
        sessions={"loop": session},
        num_steps=3,
        reference=made,
    )
    assert report.reference is not None
    assert report.ok == report.reference.equal
    assert str(report.reference) in " ".join(str(report).split()) or len(str(report.reference)) > 80
    return report.reference


def test_the_same_step() -> None:
    result = compared(loop(stats_twice=False))
    assert result.equal
    assert result.error < 1e-9
    assert result.steps == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ["both passes update the running statistics"]),
        (
            {"stats_twice": False, "decay_in_ascent": True},
            ["weight decay is part of the gradient that is ascended"],
        ),
        (
            {"decay_in_ascent": True},
            [
                "both passes update the running statistics",
                "weight decay is part of the gradient that is ascended",
            ],
        ),
        (
            {"stats_twice": False, "per_tensor": True},
            ["each parameter is perturbed by rho, with its own norm"],
        ),
        (
            {"stats_twice": False, "perturbs": False},
            ["there is no perturbation: this is the base optimizer alone"],
        ),
        ({"stats_twice": False, "sign": -1.0}, ["the perturbation has the opposite sign"]),
        (
            {"stats_twice": False, "returns_second": True},
            ["the loss that it returns is that of the second pass"],
        ),
    ],
)
def test_the_choice_in_which_it_differs_is_named(options: dict[str, Any], said: list[str]) -> None:
    result = compared(loop(**options))
    assert not result.equal
    assert sorted(result.differs_in) == sorted(said)


def test_an_unknown_difference_is_said_to_be_one() -> None:
    def make(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        optimizer.param_groups[0]["lr"] *= 1.5
        return loop(stats_twice=False)(model, optimizer)

    result = compared(make)
    assert not result.equal
    assert result.differs_in == ()
    assert "no one or two of the known choices explain it" in str(result)
    assert 0.3 < result.error < 1.0


def test_a_loop_that_raises_is_no_verdict() -> None:
    def make(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        def step(x: Tensor, y: Tensor) -> Tensor:
            raise KeyError("mistake")

        return step

    with pytest.raises(sx.ParityError, match=r"reference loop raised KeyError.*reference\(model"):
        compared(make)


def test_a_loop_in_float32_only_is_compared_in_float32() -> None:
    def make(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        inner = loop()(model, optimizer)
        return lambda x, y: inner(x.float(), y)  # fails where the model is float64

    result = compared(make)
    assert result.differs_in == ("both passes update the running statistics",)
