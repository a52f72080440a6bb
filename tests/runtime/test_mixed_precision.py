"""Autocast and loss scaling in every target: an overflow skips the step and lowers the scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import sam_export as sx
from sam_export.artifact.folder import open_artifact
from sam_export.cli.app import main
from tests.runtime.mixed_cases import SCALING, Small, batch, step_of
from tests.runtime.target_cases import RUN_HERE, TARGETS

ONNX = ["onnx", "onnx-training", "ort-artifacts"]
TORCH = ["torch-compile", "torchscript", "aot-inductor"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One float16 step in the form of every target, each in the folder of its name."""
    folder = tmp_path_factory.mktemp("mixed")
    captured = sx.capture(step_of(), batch())
    for target in TARGETS:
        sx.export(captured, folder / target, target=target)
    return folder


def unscaled(state: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name: value for name, value in state.items() if not name.startswith("scaler.")}


@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize("target", TARGETS)
def test_an_overflow_skips_the_update_and_halves_the_scale(
    target: str, which: str, exported: Path
) -> None:
    """As in the eager step, which a loop with torch's own scaler equals bit for bit."""
    session, eager = sx.load(exported / target, threads=1), step_of()
    for run in (session.step, eager):
        assert bool(run(*batch(1)).finite)
    before = session.state
    x, y = batch(2)
    if which == "first":
        x, rho = x * 1e5, 0.05  # float16 ends at 65504
    else:
        rho = 1e6
    eager.optimizer.param_groups[0]["rho"] = rho
    found, expected = session.step(x, y, rho=rho), eager(x, y)
    for result in (found, expected):
        assert not bool(result.finite)
        assert np.isfinite(float(result.grad_norm)) == (which == "second")
        assert float(result.loss_scale) == 1024.0
    assert (eager.loss_scale, eager.growth_tracker) == (512.0, 0)
    after = session.state
    assert (float(after["scaler.scale"]), int(after["scaler.growth_tracker"])) == (512.0, 0)
    for name, value in unscaled(after).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    eager.optimizer.param_groups[0]["rho"] = 0.05
    found, expected = session.step(*batch(3), rho=0.05), eager(*batch(3))
    assert bool(found.finite)
    assert float(found.loss_scale) == 512.0
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=5e-3)
    changed = unscaled(session.state)
    assert any((changed[name] != before[name]).any() for name in changed)


@pytest.mark.parametrize("target", TARGETS)
def test_the_scale_grows_after_its_interval_and_goes_with_checkpoints(
    target: str, exported: Path, tmp_path: Path
) -> None:
    session = sx.load(exported / target, threads=1)
    for seed in range(4):
        assert bool(session.step(*batch(seed)).finite)
    session.save(tmp_path / "run.ckpt")
    for other in RUN_HERE:
        restored = sx.load(exported / other, threads=1)
        restored.restore(tmp_path / "run.ckpt")
        state = restored.state
        assert (float(state["scaler.scale"]), int(state["scaler.growth_tracker"])) == (2048.0, 1)


@pytest.mark.parametrize("target", TARGETS)
def test_the_scale_goes_to_an_eager_step_and_back(target: str, exported: Path) -> None:
    session = sx.load(exported / target, threads=1)
    for seed in range(4):
        session.step(*batch(seed))
    step = step_of()
    session.load_into(step)
    assert (step.loss_scale, step.growth_tracker) == (2048.0, 1)
    for seed in range(3):
        step(*batch(seed))
    assert (step.loss_scale, step.growth_tracker) == (4096.0, 1)
    session.load_from(step)
    state = session.state
    assert (float(state["scaler.scale"]), int(state["scaler.growth_tracker"])) == (4096.0, 1)
    assert state["scaler.scale"].dtype == np.float32
    assert float(session.step(*batch(5)).loss_scale) == 4096.0
    # A model and an optimizer have no scale: the session keeps its own.
    session.load_from(step.model, step.optimizer)
    assert float(session.state["scaler.scale"]) == 4096.0


def test_a_step_with_another_scaling_is_refused(exported: Path) -> None:
    session = sx.load(exported / "torchscript")
    for scaling in (None, sx.LossScaling(1024.0, growth_interval=4)):
        other = step_of(scaling=scaling)
        for move in (session.load_into, session.load_from):
            with pytest.raises(sx.SessionError, match="loss_scaling=.*Nothing changed"):
                move(other)
    plain = sx.load(sx.capture(step_of(scaling=None), batch()), target="torchscript")
    with pytest.raises(sx.SessionError, match="this step None"):
        plain.load_into(step_of())


@pytest.mark.parametrize("target", TARGETS)
def test_evaluation_casts_as_the_step_does(target: str, exported: Path) -> None:
    session = sx.load(exported / target, threads=1)
    model = step_of().model.eval()
    x, y = batch(4)
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        outputs = model(x)
        loss = nn.functional.cross_entropy(outputs, y)
    found = session.evaluate(x)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.astype(np.float16).astype(np.float32), found)
    np.testing.assert_allclose(found, outputs.float(), atol=2e-3)
    assert session.evaluate_loss(x, y) == pytest.approx(float(loss), rel=2e-3)


@pytest.mark.parametrize("target", TORCH)
def test_bfloat16_runs_in_the_torch_targets(target: str) -> None:
    step = step_of(autocast=torch.bfloat16, scaling=None)
    session = sx.load(sx.capture(step, batch()), target=target, threads=1)
    for seed in range(3):
        found, expected = session.step(*batch(seed)), step(*batch(seed))
        assert bool(found.finite)
        assert found.loss_scale is None
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=3e-2)
    assert session.evaluate(batch()[0]).dtype == np.float32


@pytest.mark.parametrize("target", ONNX)
def test_bfloat16_is_refused_for_onnx_runtime_on_the_cpu(target: str, tmp_path: Path) -> None:
    captured = sx.capture(step_of(autocast=torch.bfloat16, scaling=None), batch())
    with pytest.raises(sx.LoweringError, match="bfloat16.*CPU has no kernels"):
        sx.export(captured, tmp_path / "step", target=target)
    assert not (tmp_path / "step").exists()


class Detour(nn.Module):
    """A product that float16 cannot hold, between two operators, and is small again after it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.sqrt(torch.relu((y * 60000.0) * 60000.0) + 1.0) * 1e-3 + y


# aot-inductor compiles what torch-compile does, for longer.
@pytest.mark.parametrize("target", [t for t in TARGETS if t != "aot-inductor"])
def test_what_overflows_only_between_two_operators_is_seen(target: str) -> None:
    """ONNX Runtime leaves out casts to float16 and back, and Inductor keeps float32 in between."""
    step = step_of(Detour())
    session = sx.load(sx.capture(step, batch()), target=target, threads=1)
    assert not bool(session.step(*batch()).finite)
    assert not bool(step(*batch()).finite)
    assert float(session.state["scaler.scale"]) == step.loss_scale == 512.0


@pytest.mark.parametrize("target", ["torchscript", "onnx"])
def test_dropout_draws_the_same_masks(target: str) -> None:
    torch.manual_seed(3)
    step = step_of(Small(dropout=0.5), seed=7)
    session = sx.load(sx.capture(step, batch(size=64)), target=target, threads=1)
    for seed in range(3):
        found, expected = session.step(*batch(seed, 64)), step(*batch(seed, 64))
        # Another mask changes a loss by some percent.
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=2e-3)
        assert float(found.perturbed_loss) == pytest.approx(
            float(expected.perturbed_loss), rel=2e-3
        )


def test_the_artifact_says_it(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contract = open_artifact(exported / "onnx").contract
    assert (contract.autocast, contract.loss_scaling) == ("float16", SCALING)
    assert main(["inspect", str(exported / "onnx")]) == 0
    shown = capsys.readouterr().out
    assert "autocast float16, loss scaled by 1024 at first (times 2 after 3 steps" in shown
    assert "scaler.growth_tracker" in shown
