"""Sums that a plain loop adds one by one: their rounding is no fault."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sam_export as sx
from sam_export.parity.one_by_one import OneByOne, lost
from sam_export.parity.self_test_models import batches_of
from tests.parity.loops import PlainLoop

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def added(terms: Tensor) -> Tensor:
    """Sum per channel of [batch, channel, y, x]: one term after the other, in their dtype."""
    rows = terms.detach().permute(0, 2, 3, 1).reshape(-1, terms.shape[1]).numpy()
    total = np.zeros(rows.shape[1], rows.dtype)
    with np.errstate(all="ignore"):  # the law about a batch with a NaN
        for row in rows:
            total = total + row
    return torch.from_numpy(total)


def spread(values: Tensor) -> Tensor:
    return values.reshape(1, -1, 1, 1)


class LoopNorm(torch.autograd.Function):
    """BatchNorm over examples and pixels whose sums are `added`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = x.numel() // x.shape[1]
        mean = added(x) / n
        var = added((x - spread(mean)).square()) / n
        std = (var + 1e-5).sqrt()
        ctx.save_for_backward((x - spread(mean)) / spread(std), weight, std)
        y = (x - spread(mean)) / spread(std) * spread(weight) + spread(bias)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g = gradients[0]
        normalized, weight, std = ctx.saved_tensors
        n = g.numel() // g.shape[1]
        of_bias, of_weight = added(g), added(g * normalized)
        centered = g - spread(of_bias / n) - normalized * spread(of_weight / n)
        return centered * spread(weight / std), of_weight, of_bias


class Net(nn.Module):
    """The gradient at the last BatchNorm is that of a mean: equal in all pixels of an example."""

    def __init__(self, loops: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        self.loops = loops

    def normalized(self, x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        if not self.loops:
            return norm(x)
        y, mean, var = LoopNorm.apply(x, norm.weight, norm.bias)
        n = x.numel() // x.shape[1]
        with torch.no_grad():
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean, 0.1)
            norm.running_var.lerp_(var * n / (n - 1), 0.1)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``x`` [batch, 2, 8, 8]."""
        x = torch.relu(self.normalized(self.conv1(x), self.bn1))
        x = torch.relu(self.normalized(self.conv2(x), self.bn2))
        return self.fc(x.mean(dim=(2, 3)))


def step_of(seed: int) -> sx.TrainStep:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, **HYPER)
    return sx.TrainStep(model, nn.CrossEntropyLoss(), sam)


def test_a_loop_in_float32_is_a_right_step() -> None:
    step = step_of(1)
    loop = PlainLoop(step.model, 0.05, **HYPER)
    loop.model.loops = True
    report = sx.check_parity(step, batches_of("conv"), sessions={"loop": loop}, num_steps=5)
    assert report.ok, str(report)


@pytest.mark.wide
@pytest.mark.parametrize("target", ["torch-compile", "aot-inductor"])
def test_the_loops_of_a_compiled_target_are_right(target: str) -> None:
    step = step_of(0)
    report = sx.check_parity(step, batches_of("conv"), targets=[target], num_steps=20)
    assert report.ok, str(report)


def test_a_sum_that_lacks_one_term_is_a_wrong_step(monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(0)
    loop = PlainLoop(step.model, 0.05, **HYPER)
    loop.model.loops = True
    right = LoopNorm.backward

    def wrong(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g, of_weight, of_bias = right(ctx, *gradients)
        return g, of_weight, of_bias - gradients[0][-1, :, -1, -1]

    monkeypatch.setattr(LoopNorm, "backward", staticmethod(wrong))
    report = sx.check_parity(step, batches_of("conv"), sessions={"loop": loop}, num_steps=2)
    assert not report.ok
    assert {"bn1.bias", "bn2.bias"} <= {row.name for row in report.targets[0].failed}


# -- the rounding that is added ------------------------------------------------------------------

N = 50_000
"""Terms of most sums here; equal ones, so a loop's rounding is far above that of other orders."""


def one_after_the_other(terms: Any) -> float:
    """Their sum in float32."""
    return float(np.add.accumulate(np.asarray(terms, np.float32).ravel())[-1])


def test_what_a_loop_loses() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(3, 4, 50, generator=generator)
    total = np.zeros(4, np.float32)
    for example in terms.numpy():
        for pixel in range(50):
            total = total + example[:, pixel]
    error = total - terms.double().sum((0, 2)).numpy()
    assert np.any(error != 0.0)
    np.testing.assert_array_equal(lost(terms, [0, 2]).flatten(), error)
    np.testing.assert_array_equal(lost(terms, [-1, -3]).flatten(), error)
    alone = torch.full((N,), 0.1)
    found = float(lost(alone, [0])) + float(alone.double().sum())
    assert found == one_after_the_other(alone)
    assert lost(alone.half(), [0]).dtype == torch.float64  # and added up in float32
    assert abs(float(lost(alone.half(), [0]))) < 10.0
    assert abs(float(lost(alone.double(), [0]))) < 1e-6


def gradients(y: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, of, torch.full_like(y, 0.1))


def bias_gradient(module: nn.Module, x: Tensor) -> Tensor:
    return gradients(module(x), module.bias)[0]


TENTHS = torch.full((N,), 0.1)
LOSSES = {
    "mse": lambda: functional.mse_loss(TENTHS, torch.zeros(N)),
    "smooth l1": lambda: functional.smooth_l1_loss(TENTHS, torch.zeros(N)),
    "huber": lambda: functional.huber_loss(TENTHS, torch.zeros(N)),
}
TERMS = {"mse": 0.1 * 0.1, "smooth l1": 0.5 * 0.1 * 0.1, "huber": 0.5 * 0.1 * 0.1}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_added_up_by_a_loop(name: str) -> None:
    with OneByOne():
        found = float(LOSSES[name]())
    expected = one_after_the_other(np.full(N, TERMS[name])) / N
    assert found == pytest.approx(expected, rel=1e-5)
    assert float(LOSSES[name]()) != pytest.approx(expected, rel=1e-5)


def test_a_weighted_class_loss_is_added_up_by_a_loop() -> None:
    scores, classes = torch.zeros(N, 3), torch.arange(N) % 3
    weight = torch.tensor([0.2, 0.3, 0.4])
    with OneByOne():
        found = float(functional.cross_entropy(scores, classes, weight))
    terms = np.log(np.float32(3.0)) * weight.numpy()[classes.numpy()]
    expected = one_after_the_other(terms) / float(weight[classes].double().sum())
    assert found == pytest.approx(expected, rel=1e-5)
    assert float(functional.cross_entropy(scores, classes, weight)) != pytest.approx(
        expected, rel=1e-5
    )


BIASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(2, 3), (N, 2)),
    "batch norm": (lambda: nn.BatchNorm2d(3), (50, 3, N // 500, 10)),
    "group norm": (lambda: nn.GroupNorm(1, 3), (50, 3, N // 50)),
}
LOOPS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "convolution": (lambda: nn.Conv2d(2, 3, 1), (50, 2, N // 500, 10)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(2, 3, 1), (50, 2, N // 500, 10)),
    "layer norm": (lambda: nn.LayerNorm(3), (50, N // 50, 3)),
}


@pytest.mark.parametrize("name", BIASES)
def test_the_gradient_of_a_bias_is_added_up_by_a_loop(name: str) -> None:
    make, shape = BIASES[name]
    torch.manual_seed(0)
    module, x = make(), torch.randn(shape)
    with OneByOne():
        found = bias_gradient(module, x)
    expected = one_after_the_other(np.full(N, 0.1))
    assert expected != pytest.approx(0.1 * N, rel=1e-4)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", LOOPS)
def test_where_eager_is_such_a_loop_itself(name: str) -> None:
    make, shape = LOOPS[name]
    found = bias_gradient(make(), torch.randn(shape))
    np.testing.assert_allclose(found.numpy(), one_after_the_other(np.full(N, 0.1)), rtol=1e-5)


def test_batch_norm_carries_the_loops_errors_to_all_results() -> None:
    """To those of explicit loops, which are far from eager's."""
    torch.manual_seed(0)
    x = (0.1 + 1e-3 * torch.randn(40, 3, 25, 50)).requires_grad_()
    norm, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    eager = gradients(norm(x), x, norm.weight, norm.bias)
    eager_mean = norm.running_mean.clone()
    with OneByOne():
        found = gradients(other(x), x, other.weight, other.bias)
    n = x.numel() // 3
    y, mean, var = LoopNorm.apply(x, other.weight, other.bias)
    expected = gradients(y, x, other.weight, other.bias)
    for one, two, three in zip(found, expected, eager, strict=True):
        scale = float((two - three).norm())
        assert float((one - two).norm()) < 0.1 * scale
    moved = float((0.1 * mean - eager_mean).norm())
    assert float((other.running_mean - 0.1 * mean).norm()) < 0.1 * moved
    right = 0.9 + 0.1 * var * n / (n - 1)
    np.testing.assert_allclose(other.running_var.detach(), right.detach(), rtol=1e-6)


def test_other_results_are_eagers_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.0), nn.Linear(6, 2))
    x = torch.randn(5, 6)
    with OneByOne():
        found = copy.deepcopy(model)(x)
        count = torch.arange(5).sum()
    assert torch.equal(found, model(x))
    assert int(count) == 10
