"""A step in its three stages: what is not finite, whose is what, and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export._compat import torchscript
from sam_export.errors import SessionError, StepConfigError
from tests.runtime.staged_cases import (
    TARGETS,
    assert_equal_states,
    batch_of,
    mean,
    session_of,
    step_over,
)

# -- what is not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("target", [*TARGETS, "torch-compile"])
@pytest.mark.parametrize("where", ["ascent", "descent", "norm"])
def test_what_is_not_finite_in_any_part_is_seen_by_the_update(target: str, where: str) -> None:
    """One of three parts: NaN in its batch, in its second pass only, or too large a gradient."""
    session = session_of(target, "norm", torch.float32)
    before = session.state
    parts = [batch_of(8, torch.float32, seed) for seed in range(3)]
    if where == "ascent":
        parts[1][0] = parts[1][0] * float("nan")
    ascents = [session.ascent(*part) for part in parts]
    gradients = mean([ascent.gradients for ascent in ascents])
    if where == "norm":
        # The squares overflow, no element does; the perturbation becomes 0, and the loss finite.
        gradients = {name: value * np.float32(1e25) for name, value in gradients.items()}
    buffers = ascents[-1].buffers
    if where == "descent":
        parts[1][0] = parts[1][0] * float("inf")
    descents = [session.descent(*part, gradients=gradients, buffers=buffers) for part in parts]
    result = session.update(mean([d.gradients for d in descents]), buffers=buffers)
    assert not bool(result.finite)
    after = session.state
    for name in before:
        changed = name == "counter.step"
        assert np.array_equal(before[name], after[name]) != changed, name
    assert session.step_count == 1


@pytest.mark.parametrize("target", TARGETS)
def test_a_loss_that_overflows_alone_is_seen(target: str) -> None:
    """Its gradient is finite: the mark in one tensor tells."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    def loss_fn(output: Tensor, y: Tensor) -> Tensor:
        offset = torch.where(y[0] == 2, torch.inf, 0.0)
        return nn.functional.cross_entropy(output, y) + offset

    torch.manual_seed(0)
    model = Model()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    session = session_of_any(sx.TrainStep(model, loss_fn, sam), target)
    x, y = batch_of(8, torch.float32)
    y[0] = 2
    before = session.state
    ascent = session.ascent(x, y)
    assert np.isinf(float(ascent.loss))
    nans = {name for name, value in ascent.gradients.items() if np.isnan(value.numpy()).any()}
    assert nans == {"fc.bias"}
    whole = session.step(x, y)
    stages = sx.InStages(session).step(x, y)
    assert not bool(whole.finite)
    assert not bool(stages.finite)
    assert_equal_states(before, session.state)


def session_of_any(step: sx.TrainStep, target: str) -> sx.Session:
    captured = sx.capture(step, batch_of(8, torch.float32), staged=True)
    return sx.load(captured, target=target)


@pytest.mark.parametrize("target", TARGETS)
def test_an_overflow_lowers_the_scale(target: str) -> None:
    """Of float16, in the first pass and in the second; the next step is fine."""
    scaling = sx.LossScaling(init_scale=2.0**16)
    precision = {"autocast": torch.float16, "loss_scaling": scaling}
    session = session_of(target, "plain", torch.float32, **precision)
    stages = sx.InStages(session)
    x, y = batch_of(8, torch.float32)
    weights = session.state["0.weight"]
    for index, (scale, rho) in enumerate([(1e6, 0.05), (1.0, 1e30)]):
        result = stages.step(x * scale, y, rho=rho)
        assert not bool(result.finite)
        assert float(session.state["scaler.scale"]) == 2.0 ** (15 - index)
        np.testing.assert_array_equal(session.state["0.weight"], weights)
    for _ in range(6):  # down to a scale that fits
        result = stages.step(x, y, rho=0.05)
    assert bool(result.finite)
    assert not np.array_equal(session.state["0.weight"], weights)


def test_raise_says_so_and_changes_nothing() -> None:
    session = session_of("onnx", "norm", semantics={"on_nonfinite": "raise"})
    x, y = batch_of()
    before = session.state
    ascent = session.ascent(x * float("nan"), y)
    descent = session.descent(x, y, gradients=ascent.gradients, buffers=ascent.buffers)
    with pytest.raises(SessionError, match="not finite"):
        session.update(descent.gradients, buffers=descent.buffers, lr=0.5)
    assert_equal_states(before, session.state)
    assert session.step_count == 0
    assert session.hyper["lr"] == (0.1,)


# -- what is whose --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [*TARGETS, "torch-compile"])
def test_only_the_update_changes_the_session(target: str) -> None:
    """And what a stage returned stays what it was, in later steps too."""
    session = session_of(target, "norm")
    before = session.state
    x, y = batch_of()
    ascent = session.ascent(x, y)
    first = {name: value.numpy() for name, value in ascent.gradients.items()}
    statistics = {name: value.numpy() for name, value in ascent.buffers.items()}
    descent = session.descent(x, y, gradients=ascent.gradients, buffers=ascent.buffers)
    assert_equal_states(before, session.state)
    session.update(descent.gradients, buffers=descent.buffers)
    for seed in range(1, 3):
        sx.InStages(session).step(*batch_of(seed=seed))
    for name, value in first.items():
        np.testing.assert_array_equal(ascent.gradients[name].numpy(), value)
    for name, value in statistics.items():
        np.testing.assert_array_equal(ascent.buffers[name].numpy(), value)


def test_hyper_parameters_are_kept() -> None:
    session = session_of("onnx", "plain")
    x, y = batch_of()
    ascent = session.ascent(x, y)
    descent = session.descent(x, y, gradients=ascent.gradients, rho=0.2)
    assert float(descent.perturbation_norm) == pytest.approx(0.2)
    session.update(descent.gradients, lr=0.01)
    assert session.hyper == {"lr": (0.01,), "rho": (0.2,)}


def test_gradients_of_another_target() -> None:
    """Values of one session are taken by a session of another runtime."""
    sessions = [session_of(target, "norm") for target in ("onnx", "torchscript")]
    x, y = batch_of()
    expected = session_of("onnx", "norm")
    expected.step(x, y)
    for one, other in (sessions, sessions[::-1]):
        ascent = one.ascent(x, y)
        descent = other.descent(x, y, gradients=ascent.gradients, buffers=ascent.buffers)
        restored = one.state
        one.update(descent.gradients, buffers=descent.buffers)
        assert_equal_states(expected.state, one.state, rel=1e-12)
        one.set_state(restored)


def test_the_module_alone(tmp_path: Path) -> None:
    """TorchScript without this package, as C++ calls it: one stage returns what the next takes."""
    step = step_over("norm", semantics={"running_stats": "both"})
    sx.export(sx.capture(step, batch_of(), staged=True), tmp_path / "step", "torchscript")
    module = torchscript.load_scripted(tmp_path / "step" / "step.pt", torch.device("cpu"))
    none: dict[str, Tensor] = {}
    for seed in range(3):
        x, y = batch_of(seed=seed)
        expected = step(x, y)
        found = module.update(module.descent(x, y, module.ascent(x, y, none)))
        assert float(found["loss"]) == pytest.approx(float(expected.loss), rel=1e-12)
        assert bool(found["finite"])
    for name, value in step.model.state_dict().items():
        np.testing.assert_allclose(getattr_path(module, name), value, rtol=1e-12)
    assert module.step_count == 3
    with pytest.raises(torch.jit.Error, match="descent needs .*running.1.running_mean"):
        module.descent(x, y, none)
    wrong = module.ascent(x, y, none)
    wrong["gradient.0.bias"] = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(torch.jit.Error, match="gradient.0.bias"):
        module.descent(x, y, wrong)


def test_the_module_alone_refuses_what_is_not_finite(tmp_path: Path) -> None:
    step = step_over("plain", semantics={"on_nonfinite": "raise"})
    sx.export(sx.capture(step, batch_of(), staged=True), tmp_path / "step", "torchscript")
    module = torchscript.load_scripted(tmp_path / "step" / "step.pt", torch.device("cpu"))
    x, y = batch_of()
    before = getattr_path(module, "0.weight").copy()
    none: dict[str, Tensor] = {}
    given = module.descent(x, y, module.ascent(x * float("nan"), y, none))
    with pytest.raises(torch.jit.Error, match=r"not finite.*nothing was changed"):
        module.update(given)
    np.testing.assert_array_equal(getattr_path(module, "0.weight"), before)
    assert module.step_count == 0


def getattr_path(module: Any, name: str) -> np.ndarray:
    for part in name.split("."):
        module = getattr(module, part)
    return module.detach().numpy()


# -- mistakes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session() -> sx.Session:
    return session_of("onnx", "norm")


def test_what_is_missing_or_does_not_fit(session: sx.Session) -> None:
    x, y = batch_of()
    before = session.state
    ascent = session.ascent(x, y)
    g, buffers = ascent.gradients, ascent.buffers
    zeros = {name: np.zeros_like(value.numpy()) for name, value in g.items()}
    cases: list[tuple[str, Any]] = [
        ("needs buffers", lambda: session.descent(x, y, gradients=g)),
        ("needs buffers", lambda: session.update(g)),
        ("lack '0.bias'", lambda: session.update({"0.weight": g["0.weight"]}, buffers=buffers)),
        (
            "have 'bias', which is unknown",
            lambda: session.descent(x, y, gradients={**g, "bias": 0}, buffers=buffers),
        ),
        ("expected a dict", lambda: session.update(list(g.values()), buffers=buffers)),
        (
            "gradients of update: tensor 'perturbed_gradient.0.bias' has shape",
            lambda: session.update({**zeros, "0.bias": np.zeros(3)}, buffers=buffers),
        ),
        (
            "has dtype float32; expected float64",
            lambda: session.update({**zeros, "0.bias": np.zeros(8, np.float32)}, buffers=buffers),
        ),
        ("is a float; expected", lambda: session.update({**zeros, "0.bias": 0.0}, buffers=buffers)),
        ("part=-1", lambda: session.ascent(x, y, part=-1)),
        ("part=True", lambda: session.ascent(x, y, part=True)),
        ("Size 1 in dimension 0", lambda: session.ascent(x[:1], y[:1])),
        ("ascent takes 2 tensors", lambda: session.ascent(x)),
        ("Unknown hyper-parameter", lambda: session.update(g, buffers=buffers, momentum=0.5)),
    ]
    for message, call in cases:
        with pytest.raises(SessionError, match=message):
            call()
    assert_equal_states(before, session.state)
    assert session.step_count == 0


def test_a_session_without_stages() -> None:
    session = sx.load(sx.capture(step_over("plain"), batch_of()), target="onnx")
    with pytest.raises(SessionError, match=r"No program 'ascent'.*staged=True"):
        session.ascent(*batch_of())


def test_what_is_not_three_calls_is_not_in_stages() -> None:
    with pytest.raises(SessionError, match="every=2"):
        sx.InStages(session_of("onnx", "plain", optimizer={"every": 2}))
    with pytest.raises(SessionError, match="no stages"):
        sx.InStages(sx.load(sx.capture(step_over("plain"), batch_of()), target="onnx"))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (
            "perturbation_per='micro_batch'",
            {"semantics": {"micro_batches": 2, "perturbation_per": "micro_batch"}},
        ),
        ("ascent_steps=2", {"optimizer": {"ascent_steps": 2}}),
        ("every=2", {"optimizer": {"every": 2, "variant": sx.GSAM()}}),
    ],
)
def test_steps_that_have_no_stages(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(StepConfigError, match=message):
        sx.capture(step_over("plain", **options), batch_of(), staged=True)


def test_torchs_own_generator_has_no_stages() -> None:
    """The same draws in both passes cannot come from it; fresh ones can."""
    with pytest.raises(StepConfigError, match="torch's own generator"):
        sx.capture(step_over("dropout", semantics={"generator": "torch"}), batch_of(), staged=True)
    fresh = {"generator": "torch", "randomness": "fresh"}
    session = session_of("torchscript", "dropout", semantics=fresh)
    assert bool(sx.InStages(session).step(*batch_of()).finite)


def test_ort_artifacts_has_no_stages() -> None:
    captured = sx.capture(
        step_over("plain", torch.float32), batch_of(8, torch.float32), staged=True
    )
    with pytest.raises(sx.LoweringError, match="no stages"):
        sx.load(captured, target="ort-artifacts")
