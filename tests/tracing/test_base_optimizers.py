"""Every optimizer of `torch.optim` that takes dense gradients, with its options, in one graph."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import sam_export as sx
from tests.tracing.test_capture import Runner, worst_change

Options = dict[str, Any]

CASES: list[tuple[type[optim.Optimizer], Options]] = [
    (optim.SGD, {"lr": 0.1, "weight_decay": 0.01, "maximize": True}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    (optim.Adam, {"lr": 0.01, "weight_decay": 0.01, "amsgrad": True}),
    (optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (optim.AdamW, {"lr": 0.01, "weight_decay": 0.05, "amsgrad": True, "maximize": True}),
    (optim.Adamax, {"lr": 0.01, "weight_decay": 0.01, "maximize": True}),
    (optim.NAdam, {"lr": 0.01, "weight_decay": 0.01}),
    (optim.NAdam, {"lr": 0.01, "decoupled_weight_decay": True, "maximize": True}),
    (optim.RAdam, {"lr": 0.01, "betas": (0.9, 0.9), "weight_decay": 0.01}),
    (optim.RAdam, {"lr": 0.01, "decoupled_weight_decay": True, "maximize": True}),
    (optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    (optim.RMSprop, {"lr": 0.01, "weight_decay": 0.01, "maximize": True}),
    (optim.Adagrad, {"lr": 0.01, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    (optim.Adagrad, {"lr": 0.01, "weight_decay": 0.01, "maximize": True}),
    (optim.Adadelta, {"lr": 1.0, "base_rho": 0.8, "weight_decay": 0.01}),
    (optim.Adadelta, {"lr": 1.0, "maximize": True}),
    (optim.ASGD, {"lr": 0.05, "t0": 3.0, "lambd": 0.01, "weight_decay": 0.01}),
    (optim.Rprop, {"lr": 0.01, "etas": (0.6, 1.3), "maximize": True}),
    (optim.Adafactor, {"lr": 0.01, "weight_decay": 0.01}),
    (optim.Adafactor, {"lr": 0.5, "eps": (1e-3, 1e-2), "d": 1.01, "maximize": True}),
    (optim.Muon, {"lr": 0.01, "weight_decay": 0.1}),
    (optim.Muon, {"lr": 0.01, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
]


def named(case: tuple[type[optim.Optimizer], Options]) -> str:
    return ", ".join((case[0].__name__, *case[1]))


def model_for(kind: type[optim.Optimizer]) -> nn.Module:
    """In float64; Muon takes matrices only."""
    torch.manual_seed(0)
    bias = kind is not optim.Muon
    return nn.Sequential(nn.Linear(5, 4, bias), nn.Tanh(), nn.Linear(4, 3, bias)).double()


def data(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(6, 5, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (6,), generator=generator),
        )
        for _ in range(count)
    ]


def plain_step(model: nn.Module, base: optim.Optimizer, rho: float, x: Tensor, y: Tensor) -> None:
    """One step of SAM as written by hand, over a stock optimizer that knows nothing of it."""
    parameters = list(model.parameters())
    base.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    old = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            p.add_(rho * p.grad / (norm + 1e-12))
    base.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        for p, w in zip(parameters, old, strict=True):
            p.copy_(w)
    base.step()


def state_of(model: nn.Module, base: optim.Optimizer) -> dict[str, Tensor]:
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key, value in base.state[p].items():
            if value is not None:
                state[f"slot.{key}.{name}"] = torch.as_tensor(value).clone()
    return state


@pytest.mark.parametrize("case", CASES, ids=named)
def test_the_graph_takes_the_steps_of_the_stock_optimizer(
    case: tuple[type[optim.Optimizer], Options],
) -> None:
    """Six steps: past RAdam's first rectified one, ASGD's start of averaging and Rprop's turns."""
    kind, options = case
    # Slots such as NAdam's mu_product take the default dtype.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = model_for(kind)
        sam = sx.SAM(model.parameters(), kind, rho=0.05, **options)
        captured = sx.capture(sx.TrainStep(model, nn.CrossEntropyLoss(), sam), data(1)[0])
        runner = Runner(captured)
        start = {name: value.clone() for name, value in runner.state.items()}
        own = {{"base_rho": "rho"}.get(key, key): value for key, value in options.items()}
        base = kind(model.parameters(), **own)
        for x, y in data(6):
            runner.step((x, y))
            plain_step(model, base, 0.05, x, y)
            expected = state_of(model, base)
            assert set(expected) == set(runner.state) - {"counter.started"}
            assert worst_change(start, runner.state, expected) < 1e-11
    finally:
        torch.set_default_dtype(before)


def test_sam_and_adadelta_have_a_rho_each() -> None:
    model = model_for(optim.Adadelta)
    groups = [{"params": model[0].parameters(), "rho": 0.3}, {"params": model[2].parameters()}]
    sam = sx.SAM(groups, optim.Adadelta, rho=0.05, base_rho=0.8, lr=1.0)
    assert [(g["sam_rho"], g["rho"]) for g in sam.param_groups] == [(0.3, 0.8), (0.05, 0.8)]
    assert sam.defaults["rho"] == 0.8
    captured = sx.capture(sx.TrainStep(model, nn.CrossEntropyLoss(), sam), data(1)[0])
    assert {spec.name: spec.defaults for spec in captured.contract.hyper}["rho"] == (0.3, 0.05)
    extra = nn.Parameter(torch.zeros(2))
    sam.add_param_group({"params": [extra], "rho": 0.7, "base_rho": 0.5})
    assert (sam.param_groups[2]["sam_rho"], sam.param_groups[2]["rho"]) == (0.7, 0.5)
    with pytest.raises(ValueError, match="rho=-1"):
        sx.SAM(model.parameters(), optim.Adadelta, rho=-1)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_special_first_update_has_a_state_that_tells(steps_before: int) -> None:
    """Eager makes SGD's momentum a copy of the first gradient, which dampening does not touch."""
    model = model_for(optim.SGD)
    sam = sx.SAM(model.parameters(), optim.SGD, lr=0.1, momentum=0.9, dampening=0.3)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam)
    for batch in data(steps_before):
        step(*batch)
    captured = sx.capture(step, data(1)[0])
    assert ("counter.started" in captured.state) == (steps_before == 0)
    runner = Runner(captured)
    start = {name: value.clone() for name, value in runner.state.items()}
    for batch in data(3):
        step(*batch)
        runner.step(batch)
        expected = {name: p.detach() for name, p in model.named_parameters()}
        assert worst_change(start, runner.state, expected) < 1e-12


class CountsInItsGroup(optim.SGD):
    """Divides the learning rate by a step number that it keeps as a number, as many do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_an_option_that_changes_by_itself_is_refused() -> None:
    model = model_for(optim.SGD)
    sam = sx.SAM(model.parameters(), CountsInItsGroup, lr=0.1)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam)
    with pytest.raises(sx.StepConfigError, match="CountsInItsGroup changes 'k'"):
        sx.capture(step, data(1)[0])


class InTheOldStyle(optim.Optimizer):
    """Adam as written before torch kept step counts in tensors, and as many still write theirs."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})
        self.eps = 1e-8  # beside the groups: copies of an optimizer do not have it

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            one, two = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["step"] = 0
                    state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
                    state["unused"] = None
                state["step"] += 1
                state["mean"].mul_(one).add_(p.grad, alpha=1 - one)
                state["square"].mul_(two).addcmul_(p.grad, p.grad, value=1 - two)
                size = group["lr"] * math.sqrt(1 - two ** state["step"])
                size = min(size / (1 - one ** state["step"]), 0.5)
                denominator = state["square"].sqrt().add_(self.eps)
                p.addcdiv_(state["mean"], denominator, value=-size)


def test_an_optimizer_that_counts_in_python_numbers() -> None:
    """In the graph the number is a float64 scalar; the parity check's oracle takes it as it is."""
    model = model_for(InTheOldStyle)
    sam = sx.SAM(model.parameters(), InTheOldStyle, rho=0.05, lr=0.01)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam)
    report = sx.check_parity(step, data(3), targets=["torchscript"], num_steps=6, isolate=False)
    assert report.ok, str(report)
    captured = sx.capture(step, data(1)[0])
    runner = Runner(captured)
    start = {name: value.clone() for name, value in runner.state.items()}
    base = InTheOldStyle(model.parameters(), lr=0.01)
    for x, y in data(6):
        runner.step((x, y))
        plain_step(model, base, 0.05, x, y)
        assert worst_change(start, runner.state, state_of(model, base)) < 1e-12
    session = sx.load(captured, target="torchscript")
    session.load_from(model, base)
    assert session.state["slot.step.0.weight"] == 6


@pytest.mark.parametrize("kind", [optim.LBFGS, optim.SparseAdam])
def test_what_cannot_be_a_base_optimizer_is_refused(kind: type[optim.Optimizer]) -> None:
    with pytest.raises(sx.StepConfigError, match=f"{kind.__name__} cannot be the base optimizer"):
        sx.SAM(model_for(kind).parameters(), kind, lr=0.1)
