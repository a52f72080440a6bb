"""Clipping of the second gradient, and the norm over the perturbed parameters only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from tests.tracing.test_base_optimizers import data
from tests.tracing.test_capture import Runner, worst_change

RHO = 0.3


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()


def made(only_norms: bool = False, **semantics: Any) -> sx.TrainStep:
    own = model()
    norms = list(own[1].parameters())
    rest = [p for p in own.parameters() if all(p is not n for n in norms)]
    groups = [{"params": rest, "rho": 0.0 if only_norms else RHO}, {"params": norms, "rho": RHO}]
    sam = sx.SAM(groups, torch.optim.SGD, lr=0.1, momentum=0.9)
    return sx.TrainStep(own, nn.CrossEntropyLoss(), sam, semantics=sx.Semantics(**semantics))


def gradient(own: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(nn.functional.cross_entropy(own(x), y), own.parameters()))


def length(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients]).norm()


def by_hand(own: nn.Module, x: Tensor, y: Tensor, only_norms: bool) -> list[Tensor]:
    """``g_adv``, with one norm over what is perturbed."""
    gradients, old = gradient(own, x, y), [p.detach().clone() for p in own.parameters()]
    perturbed = [2 <= i < 4 or not only_norms for i in range(len(old))]
    norm = length([g for g, is_in in zip(gradients, perturbed, strict=True) if is_in])
    with torch.no_grad():
        for p, g, is_in in zip(own.parameters(), gradients, perturbed, strict=True):
            p.add_(RHO * g / norm * is_in)
    found = gradient(own, x, y)
    with torch.no_grad():
        for p, w in zip(own.parameters(), old, strict=True):
            p.copy_(w)
    return found


CASES: dict[str, dict[str, Any]] = {
    "norm": {"clip_norm": 0.05},
    "norm that is never reached": {"clip_norm": 50.0},
    "value": {"clip_value": 0.01},
    "both": {"clip_value": 0.05, "clip_norm": 0.08},
    "only norm layers": {"only_norms": True, "norm_over": "perturbed"},
    "only norm layers, clipped": {"only_norms": True, "norm_over": "perturbed", "clip_norm": 0.1},
}


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("name", CASES)
def test_one_step_after_the_other_equals_the_formula(name: str, graph: bool) -> None:
    """SGD with momentum over torch's own clipping functions, written out here."""
    step = made(**CASES[name])
    options = dict(CASES[name])
    only_norms = options.pop("only_norms", False)
    runner = Runner(sx.capture(step, data(1)[0])) if graph else None
    own = model()
    start = {n: p.detach().clone() for n, p in own.named_parameters()}
    base = torch.optim.SGD(own.parameters(), lr=0.1, momentum=0.9)
    for x, y in data(3):
        g_adv = by_hand(own, x, y, only_norms)
        before = length(g_adv)
        for p, g in zip(own.parameters(), g_adv, strict=True):
            p.grad = g.clone()
        if "clip_value" in options:
            nn.utils.clip_grad_value_(own.parameters(), options["clip_value"])
        if "clip_norm" in options:
            nn.utils.clip_grad_norm_(own.parameters(), options["clip_norm"])
        base.step()
        found = runner.step((x, y)) if runner else vars(step(x, y))
        if "clip_norm" in options or "clip_value" in options:
            shown = float(found["perturbed_grad_norm"])
            assert shown == pytest.approx(float(before), rel=1e-12)
        else:
            assert found.get("perturbed_grad_norm") is None
        assert float(found["perturbation_norm"]) == pytest.approx(RHO, rel=1e-9)
        state = (
            runner.state if runner else {n: p.detach() for n, p in step.model.named_parameters()}
        )
        expected = {n: p.detach() for n, p in own.named_parameters()}
        assert worst_change(start, state, expected) < 1e-11


@pytest.mark.parametrize("target", ["torchscript", "onnx", "ort-artifacts"])
def test_targets_clip(target: str) -> None:
    step = made(only_norms=True, norm_over="perturbed", clip_norm=0.1, clip_value=0.05)
    if target == "ort-artifacts":
        step.model.float()
    dtype = next(step.model.parameters()).dtype
    batches = [(x.to(dtype), y) for x, y in data(3)]
    report = sx.check_parity(step, batches, targets=[target], num_steps=5, isolate=False)
    assert report.ok, str(report)
    assert any(row.name == "perturbed_grad_norm" for row in report.targets[0].rows)


def test_the_check_sees_a_step_that_does_not_clip() -> None:
    """The same step without clipping differs, in the parameters first."""
    right, wrong = made(clip_norm=0.05), made()
    session = sx.load(sx.capture(wrong, data(1)[0]), target="torchscript")
    report = sx.check_parity(right, data(3), sessions={"unclipped": session}, num_steps=2)
    assert not report.ok
    assert {row.name for row in report.targets[0].failed} >= {"perturbed_grad_norm", "0.weight"}


@pytest.mark.parametrize("options", [{"clip_norm": 0.0}, {"clip_value": -1.0}, {"clip_norm": True}])
def test_bad_bounds_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(sx.StepConfigError, match="expected a finite number above 0, or None"):
        sx.Semantics(**options)
