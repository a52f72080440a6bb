"""``stages=True``: both gradients and the perturbation of every parameter, on every target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sam_export as sx
from tests.parity.cases import HYPER, RHO, batches_for, step_of


def by_hand(step: sx.TrainStep, x: torch.Tensor, y: torch.Tensor) -> dict[str, np.ndarray]:
    """In plain autograd, away from the oracle."""
    named = {n: p for n, p in step.model.named_parameters() if p.requires_grad}
    loss = nn.functional.cross_entropy(step.model(x), y)
    g = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    norm = torch.cat([v.flatten() for v in g.values()]).norm()
    eps = {n: RHO * v / norm for n, v in g.items()}
    moved = {n: (p + eps[n]).detach().requires_grad_() for n, p in named.items()}
    frozen = dict(step.model.named_parameters()) | dict(step.model.named_buffers())
    output = torch.func.functional_call(step.model, {**frozen, **moved}, (x,))
    second = torch.autograd.grad(nn.functional.cross_entropy(output, y), list(moved.values()))
    stages = {f"g.{n}": v for n, v in g.items()} | {f"eps.{n}": v for n, v in eps.items()}
    stages |= {f"g_adv.{n}": v for n, v in zip(named, second, strict=True)}
    return {name: value.detach().numpy() for name, value in stages.items()}


@pytest.mark.parametrize("target", ["onnx", "onnx-training", "torchscript"])
def test_a_session_returns_them(target: str) -> None:
    step = step_of("mlp", "float64")
    x, y = batches_for("mlp", "float64")[0]
    captured = sx.capture(step, (x, y), stages=True)
    found = sx.load(captured, target=target, threads=1).step(x, y).stages
    wanted = by_hand(step, x, y)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        error = np.linalg.norm(np.asarray(found[name]) - value)
        assert error <= 1e-10 * np.linalg.norm(value), name
    assert sx.load(sx.capture(step, (x, y)), target=target, threads=1).step(x, y).stages == {}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_they_are_compared_on_an_artifact_of_their_own(dtype: str) -> None:
    report = sx.check_parity(
        step_of("conv", dtype),
        batches_for("conv", dtype),
        targets=["onnx", "torchscript"],
        num_steps=3,
        stages=True,
    )
    assert report.ok, str(report)
    assert [target.name for target in report.targets] == [
        "onnx",
        "torchscript",
        "onnx, stages",
        "torchscript, stages",
    ]
    rows = {row.name: row for row in report.targets[2].rows}
    assert {"stage.g.fc.weight", "stage.eps.fc.weight", "stage.g_adv.fc.weight"} <= set(rows)
    assert rows["stage.g.fc.weight"].role == "stage"
    assert {row.mode for row in report.targets[2].rows} == {"lock-step"}
    assert not any(row.name.startswith("stage.") for row in report.targets[0].rows)


def test_a_wrong_second_gradient_is_the_first_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """All before it is right; without stages only slots and parameters would show it."""
    from sam_export.step import micro_batches

    right = micro_batches.two_passes

    def wrong(*arguments: Any, **named: Any) -> Any:
        passes = right(*arguments, **named)
        stages = named.get("stages")
        for name, value in passes.gradients.items():
            passes.gradients[name] = value * 1.01
            if stages is not None:
                stages[f"g_adv.{name}"] = value * 1.01
        return passes

    monkeypatch.setattr(micro_batches, "two_passes", wrong)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5))
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=RHO, **HYPER)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam)
    report = sx.check_parity(
        step, batches_for("mlp", "float32"), targets=["onnx"], num_steps=2, stages=True
    )
    shipped, staged = report.targets
    assert shipped.first_difference is not None
    assert shipped.first_difference.stage == "slots"
    assert staged.first_difference is not None
    assert staged.first_difference.stage == "adversarial gradients"
