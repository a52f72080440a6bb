"""Adaptive SAM and perturbations of the user's own, eager and in the graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from tests.tracing.test_base_optimizers import data
from tests.tracing.test_capture import Runner, worst_change

RHO = 0.3


def ascent_of_signs(
    parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], radii: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A step of ``rho`` in each coordinate: the steepest one in the largest norm."""
    return {name: g.sign() * radii[name].to(g) for name, g in gradients.items()}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def made(perturbation: Any, **options: Any) -> sx.TrainStep:
    own = model()
    groups = [
        {"params": own[0].parameters(), "rho": RHO},
        {"params": own[2].parameters(), "rho": RHO / 2},
    ]
    sam = sx.SAM(groups, torch.optim.SGD, lr=0.1, momentum=0.9, perturbation=perturbation)
    return sx.TrainStep(own, nn.CrossEntropyLoss(), sam, **options)


def eps_by_hand(kind: str, own: nn.Module, gradients: list[Tensor]) -> list[Tensor]:
    """In plain arithmetic on one long vector."""
    sizes = [g.numel() for g in gradients]
    g = torch.cat([each.flatten() for each in gradients])
    w = torch.cat([p.detach().flatten() for p in own.parameters()])
    radii = [RHO if index < 2 else RHO / 2 for index in range(4)]
    rho = torch.tensor(radii, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))
    if kind == "signs":
        eps = rho * g.sign()
    else:
        scale = w.abs() + float(kind)
        eps = rho * scale**2 * g / (scale * g).norm()
    return [e.reshape(like.shape) for e, like in zip(eps.split(sizes), gradients, strict=True)]


def plain_step(kind: str, own: nn.Module, base: torch.optim.Optimizer, x: Any, y: Any) -> None:
    parameters = list(own.parameters())
    loss = nn.functional.cross_entropy
    eps = eps_by_hand(kind, own, list(torch.autograd.grad(loss(own(x), y), parameters)))
    old = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, e in zip(parameters, eps, strict=True):
            p.add_(e)
    for p, g in zip(parameters, torch.autograd.grad(loss(own(x), y), parameters), strict=True):
        p.grad = g
    with torch.no_grad():
        for p, w in zip(parameters, old, strict=True):
            p.copy_(w)
    base.step()


CASES = {"0.01": sx.ASAM(), "0": sx.ASAM(eta=0), "0.5": sx.ASAM(eta=0.5), "signs": ascent_of_signs}


@pytest.mark.parametrize("way", ["optimizer", "step", "graph"])
@pytest.mark.parametrize("kind", CASES)
def test_three_steps_equal_the_formula(kind: str, way: str) -> None:
    step, own = made(CASES[kind]), model()
    start = {name: p.detach().clone() for name, p in own.named_parameters()}
    base = torch.optim.SGD(own.parameters(), lr=0.1, momentum=0.9)
    runner = Runner(sx.capture(step, data(1)[0])) if way == "graph" else None
    for x, y in data(3):
        plain_step(kind, own, base, x, y)
        if runner:
            runner.step((x, y))
        elif way == "step":
            step(x, y)
        else:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                loss = nn.functional.cross_entropy(step.model(x), y)
                loss.backward()
                return loss

            step.optimizer.step(closure)
        state = runner.state if runner else step.model.state_dict()
        expected = {name: p.detach() for name, p in own.named_parameters()}
        assert worst_change(start, state, expected) < 1e-11


def test_adaptive_sam_does_not_see_how_layers_share_their_scale() -> None:
    """One ReLU layer scaled up and the next one down: the same perturbed loss, with eta 0."""
    torch.manual_seed(0)
    own = nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False))
    other = copy.deepcopy(own.double())
    with torch.no_grad():
        other[0].weight.mul_(8.0)
        other[2].weight.div_(8.0)
    losses: dict[str, list[float]] = {"ASAM": [], "SAM": []}
    for each in (own, other):
        for name, perturbation in (("ASAM", sx.ASAM(eta=0)), ("SAM", None)):
            copied = copy.deepcopy(each)
            sam = sx.SAM(
                copied.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, perturbation=perturbation
            )
            step = sx.TrainStep(copied, nn.CrossEntropyLoss(), sam)
            losses[name].append(float(step(*data(1)[0]).perturbed_loss))
    assert losses["ASAM"][0] == pytest.approx(losses["ASAM"][1], rel=1e-10)
    assert abs(losses["SAM"][0] - losses["SAM"][1]) > 1e-2


@pytest.mark.parametrize("target", ["torchscript", "onnx"])
@pytest.mark.parametrize("kind", ["0.01", "signs"])
def test_targets(kind: str, target: str, tmp_path: Path) -> None:
    step = made(CASES[kind])
    report = sx.check_parity(step, data(3), targets=[target], num_steps=5, isolate=False)
    assert report.ok, str(report)
    captured = sx.capture(step, data(1)[0])
    artifact = sx.export(captured, tmp_path / "artifact", target=target)
    name = {"0.01": "ASAM(eta=0.01)", "signs": f"{__name__}.ascent_of_signs"}[kind]
    assert artifact.contract.perturbation == name


def test_the_check_tells_adaptive_sam_from_sam() -> None:
    session = sx.load(sx.capture(made(None), data(1)[0]), target="torchscript")
    report = sx.check_parity(made(sx.ASAM()), data(3), sessions={"sam": session}, num_steps=2)
    assert {row.name for row in report.targets[0].failed} >= {"perturbed_loss", "0.weight"}


def test_a_copy_keeps_its_perturbation() -> None:
    assert copy.deepcopy(made(sx.ASAM(eta=0.5))).optimizer.perturbation == sx.ASAM(eta=0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda w, g, r: {}, "0.weight: missing"),
        (lambda w, g, r: {**g, "more": g["0.bias"]}, "more: no parameter with a gradient"),
        (lambda w, g, r: {n: v.sum() for n, v in g.items()}, r"0.weight: \(\[\], torch.float64\)"),
        (lambda w, g, r: {n: v.float() for n, v in g.items()}, "torch.float32"),
        (lambda w, g, r: list(g.values()), "returned a list; expected a dict"),
    ],
)
def test_what_is_no_perturbation_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(sx.StepConfigError, match=message):
        made(wrong)(*data(1)[0])


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(sx.StepConfigError, match=r"ASAM\(eta=-1\)"):
        sx.ASAM(eta=-1)
    with pytest.raises(sx.StepConfigError, match="expected ASAM"):
        made("asam")
    with pytest.raises(sx.StepConfigError, match="norm_over='perturbed'"):
        made(sx.ASAM(), semantics=sx.Semantics(norm_over="perturbed"))
