"""Autocast and dynamic loss scaling of the eager step, beside torch's own loop and its scaler."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export.artifact.contract import StepContract
from sam_export.step.loss_scaling import Scaler

RHO, LR = 0.1, 0.1


class Net(nn.Module):
    """Convolution, BatchNorm, a matrix that is used twice, LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Linear(16, 16)
        self.last = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.conv(x))), 2).flatten(1)
        return self.last(nn.functional.gelu(self.twice(torch.tanh(self.twice(x)))))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches(count: int, size: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(size * torch.randn(12, 1, 4, 4), torch.randint(5, (12,))) for _ in range(count)]


def made(model: nn.Module, **options: Any) -> sx.TrainStep:
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9)
    return sx.TrainStep(model, nn.CrossEntropyLoss(), sam, **options)


class Loop:
    """A two-pass loop with `torch.autocast` and torch's own scaler.

    A scaler unscales the gradients of one optimizer once in a step. So the first pass is that of
    another one over the same parameters; an overflow that either has seen lowers the scale.
    """

    def __init__(self, dtype: torch.dtype, scaling: sx.LossScaling) -> None:
        self.model, self.dtype = net(), dtype
        self.sgd = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=0.9)
        self.ascent = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.scaler = torch.amp.GradScaler("cpu", **scaling.to_dict())

    def backward(self, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=self.dtype):
            loss = nn.functional.cross_entropy(self.model(x), y)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(optimizer)
        return float(loss.detach())

    def step(self, x: Tensor, y: Tensor) -> float:
        parameters, buffers = list(self.model.parameters()), list(self.model.buffers())
        before, scale = copy.deepcopy(buffers), self.scaler.get_scale()
        loss = self.backward(x, y, self.ascent)
        after, old = copy.deepcopy(buffers), [p.detach().clone() for p in parameters]
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in parameters]).norm()
            for p in parameters:
                p.add_(RHO / (norm + 1e-12) * p.grad)
        self.backward(x, y, self.sgd)
        with torch.no_grad():
            for p, w in zip(parameters, old, strict=True):
                p.copy_(w)
        self.scaler.step(self.sgd)
        self.scaler.update()
        kept = before if self.scaler.get_scale() < scale else after
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)
        return loss


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_eager_step_is_that_of_a_loop_with_torchs_own_scaler(dtype: torch.dtype) -> None:
    """Bit for bit: weights, running statistics, loss, scale and tracker."""
    scaling = sx.LossScaling(init_scale=2.0**17, growth_interval=3)
    loop, model = Loop(dtype, scaling), net()
    step = made(model, autocast=dtype, loss_scaling=scaling)
    verdicts = []
    for x, y in batches(9):
        scale = loop.scaler.get_scale()
        loss = loop.step(x, y)
        result = step(x, y)
        verdicts.append(bool(result.finite))
        assert float(result.loss_scale) == scale
        assert float(result.loss) == loss
        assert step.loss_scale == loop.scaler.get_scale()
        assert step.growth_tracker == loop.scaler._get_growth_tracker()
    if dtype == torch.float16:  # it found the scale, and tried a higher one again
        assert verdicts.count(False) >= 2
        assert True in verdicts[: len(verdicts) - verdicts[::-1].index(False)]
    state = loop.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("factors", [(2.0, 0.5, 2), (3.7, 0.31, 1), (1.0001, 0.999, 3)])
def test_the_scale_goes_on_as_torch_updates_it(factors: tuple[float, float, int]) -> None:
    """Bit for bit, also where it would leave float32's range at either end."""
    growth, backoff, interval = factors
    settings = sx.LossScaling(1.0, growth, backoff, interval)
    rng = np.random.default_rng(0)
    for start in (65536.0, 3.3e38, 1e-45, 1.0):
        scale, tracker = torch.tensor(start), torch.tensor(0)
        expected, counted = torch.tensor(start), torch.tensor(0, dtype=torch.int32)
        for finite in rng.random(60) < 0.8:
            now = Scaler(settings, scale, tracker)
            scale, tracker = now.after(torch.tensor(bool(finite)))
            found_inf = torch.tensor(0.0 if finite else 1.0)
            torch._amp_update_scale_(expected, counted, found_inf, growth, backoff, interval)
            assert (float(scale), int(tracker)) == (float(expected), int(counted))


def overflowing(model: nn.Module, which: str, x: Tensor) -> tuple[Tensor, float]:
    """A batch and a radius with which the scaled gradient overflows in one of the passes."""
    if which == "first":
        return x * 3e4, RHO
    return x, 3e4


@pytest.mark.parametrize("which", ["first", "second"])
def test_an_overflow_skips_the_update_and_halves_the_scale(which: str) -> None:
    (x, y), later = batches(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    step = made(model, autocast=torch.float16, loss_scaling=sx.LossScaling(1024.0))
    assert bool(step(*later).finite)
    before = copy.deepcopy((model.state_dict(), step.optimizer.state_dict()))
    bad, rho = overflowing(model, which, x)
    step.optimizer.param_groups[0]["rho"] = rho
    result = step(bad, y)
    assert not bool(result.finite)
    assert np.isfinite(float(result.grad_norm)) == (which == "second")
    assert (step.loss_scale, step.growth_tracker) == (512.0, 0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name])
    slots = [entries["momentum_buffer"] for entries in step.optimizer.state.values()]
    old = [entries["momentum_buffer"] for entries in before[1]["state"].values()]
    assert all(map(torch.equal, slots, old))
    step.optimizer.param_groups[0]["rho"] = RHO
    assert bool(step(*later).finite)
    assert (step.loss_scale, step.growth_tracker) == (512.0, 1)


def test_results_are_float32_and_weights_stay_so() -> None:
    step = made(net(), autocast=torch.bfloat16)
    result = step(*batches(1)[0])
    assert result.loss.dtype == result.outputs.dtype == torch.float32
    assert result.loss_scale is None
    assert {p.dtype for p in step.model.parameters()} == {torch.float32}
    # but they hold no more than bfloat16 does
    assert torch.equal(result.outputs.bfloat16().float(), result.outputs)


def test_no_cast_without_autocast() -> None:
    model, other = net(), net()
    results = [made(m, **o)(*batches(1)[0]) for m, o in ((model, {}), (other, {"autocast": None}))]
    assert torch.equal(results[0].loss, results[1].loss)


def test_loss_scaling_without_autocast_changes_nothing_but_the_scale() -> None:
    """Powers of two multiply exactly: a model that casts by itself can have a scale, too."""
    plain, scaled = made(net()), made(net(), loss_scaling=sx.LossScaling(growth_interval=2))
    for batch in batches(3):
        plain(*batch)
        scaled(*batch)
    for one, other in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert scaled.loss_scale == 2.0**17


def test_state_dict_carries_the_scale() -> None:
    scaling = sx.LossScaling(2.0**13, growth_interval=2)
    step = made(net(), autocast=torch.float16, loss_scaling=scaling)
    for batch in batches(3):
        step(*batch)
    other = made(net(), autocast=torch.float16, loss_scaling=scaling)
    other.load_state_dict(step.state_dict())
    assert (other.loss_scale, other.growth_tracker) == (step.loss_scale, step.growth_tracker)
    assert (other.loss_scale, other.growth_tracker) == (2.0**14, 1)
    plain = made(net())
    plain.load_state_dict(step.state_dict())
    assert plain.loss_scale is None
    other.load_state_dict(plain.state_dict())  # of a run without: it keeps its own
    assert other.loss_scale == 2.0**14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"autocast": torch.float64}, "expected torch.float16, torch.bfloat16 or None"),
        ({"autocast": "float16"}, "expected torch.float16, torch.bfloat16 or None"),
        ({"loss_scaling": 65536.0}, "expected sam_export.LossScaling"),
        (
            {"loss_scaling": sx.LossScaling(), "semantics": sx.Semantics(on_nonfinite="raise")},
            "needs Semantics\\(on_nonfinite='skip'\\), not 'raise'",
        ),
        (
            {"loss_scaling": sx.LossScaling(), "semantics": sx.Semantics(on_nonfinite="ignore")},
            "not 'ignore'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sx.StepConfigError, match=message):
        made(net(), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_that_are_not_float32_are_refused(dtype: torch.dtype) -> None:
    for options in ({"autocast": torch.bfloat16}, {"loss_scaling": sx.LossScaling()}):
        with pytest.raises(sx.StepConfigError, match="'conv.weight' is float"):
            made(net().to(dtype), **options)
    step = made(net(), autocast=torch.bfloat16)
    step.model.to(dtype)
    batch = batches(1)[0]
    with pytest.raises(sx.StepConfigError, match="master weights"):
        step(*batch)
    with pytest.raises(sx.StepConfigError, match="master weights"):
        sx.capture(step, batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_scale": 0.0}, "above 0 that float32 can hold"),
        ({"init_scale": 1e39}, "above 0 that float32 can hold"),
        ({"init_scale": float("nan")}, "above 0 that float32 can hold"),
        ({"init_scale": True}, "a number"),
        ({"growth_factor": 1.0}, "above 1"),
        ({"growth_factor": float("inf")}, "above 1"),
        ({"backoff_factor": 1.0}, "between 0 and 1"),
        ({"backoff_factor": float("nan")}, "between 0 and 1"),
        ({"growth_interval": 0}, "at least 1"),
        ({"growth_interval": 2.0}, "at least 1"),
    ],
)
def test_settings_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sx.StepConfigError, match=message):
        sx.LossScaling(**options)


def test_defaults_are_those_of_torchs_scaler() -> None:
    scaler, ours = torch.amp.GradScaler("cpu"), sx.LossScaling()
    assert ours.init_scale == scaler.get_scale()
    assert ours.growth_factor == scaler.get_growth_factor()
    assert ours.backoff_factor == scaler.get_backoff_factor()
    assert ours.growth_interval == scaler.get_growth_interval()


def test_the_contract_holds_it_and_reads_it_back() -> None:
    scaling = sx.LossScaling(growth_interval=7)
    step = made(net(), autocast=torch.float16, loss_scaling=scaling)
    contract = sx.capture(step, batches(1)[0]).contract
    assert (contract.autocast, contract.loss_scaling) == ("float16", scaling)
    assert StepContract.from_dict(contract.to_dict()) == contract
    roles = {spec.name: (spec.role, spec.dtype) for spec in contract.state}
    assert roles["scaler.scale"] == ("scaler", "float32")
    assert roles["scaler.growth_tracker"] == ("scaler", "int64")
    assert contract.program("step").outputs[5].name == "loss_scale"
    plain = sx.capture(made(net()), batches(1)[0]).contract
    assert (plain.autocast, plain.loss_scaling) == (None, None)
    assert not any(spec.role == "scaler" for spec in plain.state)


def test_nothing_in_the_graph_reads_a_value() -> None:
    step = made(net(), autocast=torch.float16, loss_scaling=sx.LossScaling())
    graph = sx.capture(step, batches(1)[0]).programs["step"].graph
    names = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert not names & {"aten.item.default", "aten._local_scalar_dense.default"}
    casts = [node.meta["val"].dtype for node in graph.nodes if "_to_copy" in str(node.target)]
    assert torch.float16 in casts
