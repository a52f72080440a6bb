"""The oracle against hand-computed steps, and the semantics where libraries differ."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sam_export.parity import oracle as oracle_module
from sam_export.parity.oracle import Oracle


def with_rho(optimizer: torch.optim.Optimizer, *rho: float) -> torch.optim.Optimizer:
    for group, value in zip(optimizer.param_groups, rho, strict=True):
        group["rho"] = value
    return optimizer


class Quadratic(nn.Module):
    """The loss ``0.5 * a * (w - b)^2`` itself; ``a`` is the input."""

    def __init__(self, w: float, b: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))
        self.b = b

    def forward(self, a: Tensor) -> Tensor:
        return (0.5 * a * (self.w - self.b) ** 2).sum()


def quadratic(w: float, b: float, a: float, rho: float, lr: float, steps: int) -> float:
    """Closed form: the gradient at ``w + rho * sign(g)`` is ``a * (w + rho * sign(g) - b)``."""
    for _ in range(steps):
        g = a * (w - b)
        w -= lr * a * (w + rho * g / (abs(g) + 1e-12) - b)
    return w


def test_a_quadratic_follows_its_closed_form() -> None:
    model = Quadratic(2.0, -1.0)
    sgd = with_rho(torch.optim.SGD(model.parameters(), lr=0.1), 0.3)
    oracle = Oracle(model, None, sgd)
    a = np.array([1.7])
    first = oracle.step((a,))
    for _ in range(4):
        oracle.step((a,))
    expected = quadratic(2.0, -1.0, 1.7, 0.3, 0.1, steps=5)
    assert oracle.snapshot()["w"][0] == pytest.approx(expected, rel=1e-14)
    assert first["loss"] == pytest.approx(0.5 * 1.7 * 9.0, rel=1e-15)
    assert first["perturbed_loss"] == pytest.approx(0.5 * 1.7 * 3.3**2, rel=1e-12)
    assert first["grad_norm"] == pytest.approx(1.7 * 3.0, rel=1e-15)
    assert first["perturbation_norm"] == pytest.approx(0.3, rel=1e-11)
    assert first["finite"] is True
    assert model.w.item() == 2.0, "the oracle works on its own copy"


def test_momentum_and_decay_follow_their_closed_form() -> None:
    model = Quadratic(2.0, -1.0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.2)
    oracle = Oracle(model, None, with_rho(sgd, 0.3))
    w, v = 2.0, 0.0
    for _ in range(3):
        v = 0.9 * v + 1.7 * (w + 0.3 - -1.0) + 0.2 * w
        w -= 0.1 * v
        oracle.step((np.array([1.7]),))
    state = oracle.snapshot()
    assert state["w"][0] == pytest.approx(w, rel=1e-11)
    assert state["slot.momentum_buffer.w"][0] == pytest.approx(v, rel=1e-11)


def test_decay_in_ascent_is_part_of_norm_and_perturbation() -> None:
    model = Quadratic(2.0, 3.0)  # the loss pulls up, the decay pulls down
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=4.0)
    oracle = Oracle(model, None, with_rho(sgd, 0.3), decay_in_ascent=True)
    result = oracle.step((np.array([1.7]),))
    g = 1.7 * (2.0 - 3.0) + 4.0 * 2.0
    assert result["grad_norm"] == pytest.approx(g, rel=1e-14)
    expected = 2.0 - 0.1 * (1.7 * (2.3 - 3.0) + 4.0 * 2.0)
    assert oracle.snapshot()["w"][0] == pytest.approx(expected, rel=1e-11)


def test_the_norm_is_global_and_rho_is_the_groups() -> None:
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(1.0)
    groups = [{"params": [model.weight]}, {"params": [model.bias]}]
    sgd = with_rho(torch.optim.SGD(groups, lr=1.0), 0.5, 0.1)
    oracle = Oracle(model, lambda out: 3.0 * out.sum(), sgd, num_targets=0)
    result = oracle.step((np.array([[4.0]]),))  # g = (12, 3) everywhere
    norm = (12.0**2 + 3.0**2) ** 0.5
    assert result["grad_norm"] == pytest.approx(norm, rel=1e-14)
    eps = (0.5 * 12 / norm, 0.1 * 3 / norm)
    assert result["perturbation_norm"] == pytest.approx((eps[0] ** 2 + eps[1] ** 2) ** 0.5)
    loss = 3 * ((2 + eps[0]) * 4 + 1 + eps[1])
    assert result["perturbed_loss"] == pytest.approx(loss, rel=1e-12)
    assert oracle.snapshot()["weight"].item() == 2.0 - 12.0


def test_a_zero_gradient_stays_finite() -> None:
    model = Quadratic(1.0, 1.0)
    sgd = with_rho(torch.optim.SGD(model.parameters(), lr=0.1), 0.3)
    result = Oracle(model, None, sgd).step((np.array([1.0]),))
    assert result["finite"] is True
    assert result["perturbation_norm"] == 0.0


class Odd(nn.Module):
    """Tied, frozen and unused parameters, BatchNorm, dropout."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.norm(torch.tanh(self.first(x * self.frozen)))))


def odd(drop: float = 0.0, **semantics: Any) -> tuple[Odd, Oracle]:
    torch.manual_seed(0)
    model = Odd(drop)
    adam = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    return model, Oracle(model, nn.functional.mse_loss, with_rho(adam, 0.2), **semantics)


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, generator=generator), torch.randn(6, 3, generator=generator)


def test_tied_parameters_occur_once_and_frozen_and_unused_ones_stay() -> None:
    _, oracle = odd()
    before = oracle.snapshot()
    oracle.step(batch())
    after = oracle.snapshot()
    assert "second.weight" not in after
    assert oracle.model.first.weight is oracle.model.second.weight
    for name in ("unused", "frozen"):
        np.testing.assert_array_equal(after[name], before[name])
        assert not [slot for slot in after if slot.endswith("." + name)]
    assert oracle.without_gradient == {"unused", "frozen"}
    assert np.any(after["first.weight"] != before["first.weight"])
    assert sum(name.startswith("slot.exp_avg.") for name in after) == 5


def test_running_statistics_count_once_or_twice() -> None:
    x, y = batch()
    found = {}
    for running_stats in ("ascent", "both"):
        model, oracle = odd(running_stats=running_stats)
        oracle.step((x, y))
        found[running_stats] = oracle.snapshot()
    # By hand: one update of the running mean, by the activations at w.
    mean = torch.tanh(model.first(x * model.frozen)).mean(0).detach().numpy()
    np.testing.assert_allclose(found["ascent"]["norm.running_mean"], 0.1 * mean, rtol=1e-5)
    assert found["ascent"]["norm.num_batches_tracked"] == 1
    assert found["both"]["norm.num_batches_tracked"] == 2
    gap = found["both"]["norm.running_mean"] - found["ascent"]["norm.running_mean"]
    assert np.all(np.abs(gap) > 1e-3)


@pytest.mark.parametrize("kind", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_changes_nothing(kind: float) -> None:
    _, oracle = odd()
    oracle.step(batch())
    before = oracle.snapshot()
    x, y = batch(2)
    x[0, 0] = kind
    assert oracle.step((x, y))["finite"] is False
    after = oracle.snapshot()
    assert set(after) == set(before)
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_ignore_lets_a_nan_through() -> None:
    _, oracle = odd(on_nonfinite="ignore")
    x, y = batch()
    x[0, 0] = float("nan")
    assert oracle.step((x, y))["finite"] is False
    assert np.isnan(oracle.snapshot()["first.weight"]).any()


def test_both_passes_draw_the_same_dropout_or_a_fresh_one() -> None:
    gaps = {}
    for randomness in ("same", "fresh"):
        _, oracle = odd(drop=0.5, randomness=randomness)
        for group in oracle.optimizer.param_groups:
            group["rho"] = 0.0  # then only the draw can differ
        torch.manual_seed(5)
        result = oracle.step(batch())
        gaps[randomness] = abs(result["loss"] - result["perturbed_loss"])
    assert gaps["same"] == 0.0
    assert gaps["fresh"] > 1e-3


def test_a_dict_batch_goes_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return (self.w * left - right).sum(1)

    def loss(out: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
        return (weight * (out - wanted) ** 2).sum()

    left, right = np.array([[1.0, 2.0]]), np.array([[0.5, 0.0]])
    wanted, weight = np.array([1.0]), np.array([3.0])
    losses = []
    for given in (
        (left, right, wanted, weight),
        {"wanted": wanted, "right": right, "left": left, "weight": weight},
    ):
        model = Two()
        sgd = with_rho(torch.optim.SGD(model.parameters(), lr=0.1), 0.1)
        losses.append(Oracle(model, loss, sgd, num_targets=2).step(given)["loss"])
    assert losses == [pytest.approx(3.0 * (5.0 - 0.5 - 1.0) ** 2)] * 2


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam])
def test_load_is_the_inverse_of_snapshot(make: Callable[..., torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = Odd()
    oracle = Oracle(model, nn.functional.mse_loss, with_rho(make(model.parameters()), 0.1))
    start = oracle.snapshot()
    seen = []
    for _ in range(3):
        seen.append(oracle.snapshot())
        oracle.step(batch())
    last = oracle.snapshot()
    oracle.load(seen[1])
    for _ in range(2):
        oracle.step(batch())
    for name, value in oracle.snapshot().items():
        np.testing.assert_array_equal(value, last[name], err_msg=name)
    oracle.load(start)
    assert set(oracle.snapshot()) == set(start)


def test_double_is_close_and_closer_to_the_truth() -> None:
    _, single = odd()
    _, double = odd()
    double.double()
    before = single.snapshot()
    for _ in range(3):
        single.step(batch())
        double.step(batch())
    s, d = single.snapshot(), double.snapshot()
    assert d["first.weight"].dtype == np.float64
    assert d["slot.exp_avg.first.weight"].dtype == np.float64
    assert torch.get_default_dtype() is torch.float32
    np.testing.assert_allclose(s["first.weight"], d["first.weight"], atol=1e-4)
    assert np.any(s["first.weight"] != before["first.weight"])


FILES = sorted(Path(str(oracle_module.__file__)).parent.glob("oracle*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_imports_nothing_of_this_package(file: Path) -> None:
    """But its own parts."""
    tree = ast.parse(file.read_text())
    imported = [
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    ]
    own = [name for name in imported if name.startswith(("sam_export", "."))]
    assert all(name.startswith("sam_export.parity.oracle") for name in own)
    assert bool(own) or file.stem != "oracle"
