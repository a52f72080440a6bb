"""The eager optimizer, against a plain two-pass loop written here."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import sam_export as sx


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(6, 5, generator=generator).to(dtype),
            torch.randint(0, 3, (6,), generator=generator),
        )
        for _ in range(count)
    ]


def plain_loop(
    model: nn.Module, base: torch.optim.Optimizer, rho: float, data: list
) -> list[float]:
    """The classic loop; shares nothing with the package."""
    losses = []
    for x, y in data:
        base.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(float(loss.detach()))
        params = [p for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in params]).norm()
            old = [p.clone() for p in params]
            for p in params:
                p.add_(p.grad * (rho / (norm + 1e-12)))
        base.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p, w in zip(params, old, strict=True):
                p.copy_(w)
        base.step()
    return losses


def run(model: nn.Module, optimizer: sx.SAM, data: list) -> list[float]:
    losses = []
    for x, y in data:

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))
    return losses


OPTIMIZERS = {
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.05}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_plain_loop_bit_for_bit(name: str) -> None:
    base, options = OPTIMIZERS[name]
    ours, plain = small_model(), small_model()
    expected = plain_loop(plain, base(plain.parameters(), **options), 0.05, batches(10))
    assert run(ours, sx.SAM(ours.parameters(), base, rho=0.05, **options), batches(10)) == expected
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_round_trip_is_exact(name: str) -> None:
    base, options = OPTIMIZERS[name]
    data = batches(10)
    whole = small_model()
    run(whole, sx.SAM(whole.parameters(), base, rho=0.05, **options), data)

    first = small_model()
    optimizer = sx.SAM(first.parameters(), base, rho=0.05, **options)
    run(first, optimizer, data[:5])
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))

    second = small_model()
    resumed = sx.SAM(second.parameters(), base, rho=0.9, **{**options, "lr": 7.0})
    second.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert resumed.param_groups[0]["rho"] == 0.05
    assert resumed.param_groups is resumed.base_optimizer.param_groups
    run(second, resumed, data[5:])
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_step_without_closure_says_what_to_do() -> None:
    model = small_model()
    with pytest.raises(sx.StepConfigError, match="closure"):
        sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1).step()


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf"), "0.05", None, True])
def test_refuses_a_bad_rho(rho: object) -> None:
    model = small_model()
    with pytest.raises(ValueError, match="rho"):
        sx.SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=0.1)  # type: ignore[arg-type]
    groups = [{"params": list(model.parameters()), "rho": rho}]
    with pytest.raises(ValueError, match="rho"):
        sx.SAM(groups, torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("base", [torch.optim.LBFGS, torch.optim.SparseAdam, sx.SAM, "SGD", None])
def test_refuses_a_base_optimizer_that_cannot_be_one(base: object) -> None:
    with pytest.raises(sx.StepConfigError):
        sx.SAM(small_model().parameters(), base)  # type: ignore[arg-type]


def test_groups_have_their_own_rho_and_share_one_norm() -> None:
    model = small_model(torch.float64)
    x, y = batches(1, torch.float64)[0]
    groups = [
        {"params": [model[0].weight, model[0].bias], "rho": 0.3},
        {"params": [model[2].weight, model[2].bias], "rho": 0.0},
    ]
    optimizer = sx.SAM(groups, torch.optim.SGD, lr=0.1)
    nn.functional.cross_entropy(model(x), y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.first_step()
    for p, w, g, rho in zip(model.parameters(), before, grads, (0.3, 0.3, 0, 0), strict=True):
        torch.testing.assert_close(p.detach() - w, g * rho / (norm + 1e-12), rtol=1e-12, atol=1e-15)


def test_returns_to_exactly_w_and_leaves_parameters_without_gradient_alone() -> None:
    model = small_model(torch.float16)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = sx.SAM([*model.parameters(), unused], torch.optim.SGD, lr=0.0, weight_decay=0.1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.first_step()
    assert not torch.equal(before[0], model[0].weight)
    optimizer.second_step()
    for p, w in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, w)
    assert torch.equal(unused, torch.ones(3, dtype=torch.float16))


def test_zero_gradient_stays_finite() -> None:
    model = small_model()
    optimizer = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.first_step()
    for p, w in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, w)


def test_steps_in_the_wrong_order_are_refused() -> None:
    model = small_model()
    optimizer = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(sx.StepConfigError, match="backward"):
        optimizer.first_step()
    with pytest.raises(sx.StepConfigError, match="first_step"):
        optimizer.second_step()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.first_step()
    with pytest.raises(sx.StepConfigError, match="twice"):
        optimizer.first_step()


@pytest.mark.parametrize("attach_to", ["sam", "base"])
def test_a_scheduler_works_on_either_optimizer(attach_to: str) -> None:
    model = small_model()
    optimizer = sx.SAM(model.parameters(), torch.optim.SGD, lr=1.0)
    target = optimizer if attach_to == "sam" else optimizer.base_optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(target, step_size=1, gamma=0.5)
    x, y = batches(1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.5


def test_add_param_group_reaches_both_optimizers() -> None:
    model = small_model()
    optimizer = sx.SAM(model[0].parameters(), torch.optim.SGD, rho=0.2, lr=0.1)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.5})
    assert len(optimizer.base_optimizer.param_groups) == 2
    assert optimizer.param_groups[1]["rho"] == 0.2
    assert optimizer.base_optimizer.param_groups[1]["lr"] == 0.5


def test_deep_copy_keeps_the_two_optimizers_together() -> None:
    model = small_model()
    optimizer = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    run(model, optimizer, batches(2))
    model_copy, copied = copy.deepcopy((model, optimizer))
    assert copied.param_groups is copied.base_optimizer.param_groups
    assert copied.param_groups[0]["params"][0] is next(iter(model_copy.parameters()))
    run(model, optimizer, batches(3))
    run(model_copy, copied, batches(3))
    for a, b in zip(model.parameters(), model_copy.parameters(), strict=True):
        assert torch.equal(a, b)
