"""``ort-artifacts`` through `sam_export.load`: what the stock optimizer rounds, refusals, files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import sam_export as sx
from sam_export.artifact.folder import open_artifact
from sam_export.artifact.ort_checkpoint import OptimizerGroup, OrtCheckpoint
from sam_export.errors import ArtifactError, LoweringError, RuntimeUnavailableError
from sam_export.runtime import detect
from tests.runtime.ort_stock import (
    BATCHES,
    RHO,
    Artifacts,
    made,
    opened,
    train,
)
from tests.runtime.target_cases import images, make

api: Any = pytest.importorskip(
    "onnxruntime.training.api", reason="needs a training build of ONNX Runtime"
)


def test_float32_betas_explain_what_the_stock_adamw_is_off_by(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    """Its update, from torch's formula with betas and ``1 - beta^t`` in float32."""
    folder = artifacts("adamw")
    known = open_artifact(folder).details["known_rounding"]
    generator = np.random.default_rng(0)
    initial = OrtCheckpoint.from_bytes((folder / "checkpoint").read_bytes())
    f = np.float32

    def like(value: NDArray[Any], scale: float) -> NDArray[Any]:
        return (scale * generator.standard_normal(value.shape)).astype(np.float32)

    for step in (0, 1, 3, 40):
        zero = {name: np.zeros_like(value) for name, value in initial.trainable.items()}
        zero["norm.weight"] += 1  # or every gradient before it is zero
        zero["head.weight"] = initial.trainable["head.weight"]
        moments = {n: (like(v, 0.1), abs(like(v, 0.01))) for n, v in zero.items()}
        group = OptimizerGroup(step, 1.0, moments)
        (tmp_path / "now").write_bytes(OrtCheckpoint(zero, initial.frozen, group).to_bytes())
        state, module, optimizer = opened(folder, tmp_path / "now")
        optimizer.set_learning_rate(1.0)
        module(*(value.numpy() for value in BATCHES[0]))
        gradient = np.array(state.parameters["head.bias"].grad, np.float64)
        optimizer.step()
        found = np.array(state.parameters["head.bias"].data, np.float64)
        m, v = (moment.astype(np.float64) for moment in moments["head.bias"])

        def update(
            b1: float, b2: float, c1: float, c2: float, m: Any = m, v: Any = v, g: Any = gradient
        ) -> Any:
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            return -(m / c1) / (np.sqrt(v / c2) + 1e-8)

        def off(wanted: Any, found: Any = found) -> float:
            return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

        t = step + 1
        exact = update(0.9, 0.999, 1 - 0.9**t, 1 - 0.999**t)
        b1, b2 = f(0.9), f(0.999)
        c1, c2 = f(1) - np.power(b1, f(t)), f(1) - np.power(b2, f(t))
        single = update(float(b1), float(b2), float(c1), float(c2))
        assert off(single) <= 1e-6
        assert off(exact) <= known["head.bias"] + 1e-6
    assert 1e-5 < known["head.bias"] < 3e-5
    assert 1e-5 < known["slot.exp_avg_sq.head.bias"] < 2e-5


def test_a_session_calls_the_stock_classes_and_reads_their_moments(artifacts: Artifacts) -> None:
    session = sx.load(artifacts("adamw"), threads=1)
    result = session.step(*images(6, torch.float32), lr=0.02, rho=0.1)
    assert bool(result.finite)
    state = session.state
    assert state["slot.step.head.bias"] == 1.0
    assert state["slot.step.head.bias"].dtype == np.float64
    assert np.all(state["slot.exp_avg_sq.head.weight"] > 0)
    assert state["norm.num_batches_tracked"].dtype == np.int64
    uneven = {**state, "slot.step.head.bias": np.array(5.0)}
    with pytest.raises(ArtifactError, match=r"different numbers of steps \(\[1.0, 5.0\]\)"):
        session.set_state(uneven)
    for name, value in session.state.items():  # nothing of it was taken
        np.testing.assert_array_equal(value, state[name])


def test_dropout_is_drawn_inside_the_graph(tmp_path: Path) -> None:
    """The stock program feeds no random words, and draws what an eager step draws."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=0.1)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam, seed=3)
    batches = [(torch.randn(6, 5), torch.randint(0, 3, (6,))) for _ in range(5)]
    sx.export(sx.capture(step, batches[0]), tmp_path / "step", target="ort-artifacts")
    losses = train(opened(tmp_path / "step"), batches, lr=0.1)
    assert losses == pytest.approx([float(step(*batch).loss) for batch in batches], rel=1e-5)


def test_what_it_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    x, y = images(6, torch.float64)
    double = sx.capture(make(torch.float64, "sgd"), (x, y))
    with pytest.raises(LoweringError, match="gradients in float32 only.*float64"):
        sx.export(double, tmp_path / "step", target="ort-artifacts")
    assert not (tmp_path / "step").exists()


def test_an_inference_build_is_told_from_a_training_build(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = artifacts("sgd")
    import onnxruntime.capi.onnxruntime_pybind11_state as native

    monkeypatch.delattr(native, "Module")
    with pytest.raises(RuntimeUnavailableError, match="needs a training build of ONNX Runtime"):
        sx.load(folder)
    (missing,) = detect.target_status("ort-artifacts").run
    assert "ort-training" in missing.install


def test_a_damaged_file_is_refused_before_the_runtime_sees_it(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    shutil.copytree(artifacts("sgd"), tmp_path / "step")
    path = tmp_path / "step" / "optimizer_model.onnx"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"optimizer_model.onnx is not the file"):
        sx.load(tmp_path / "step")
    path.unlink()
    with pytest.raises(ArtifactError, match=r"optimizer_model.onnx is missing"):
        sx.load(tmp_path / "step")


def test_the_same_step_gives_the_same_bytes(tmp_path: Path) -> None:
    captured = sx.capture(made("momentum"), images(6, torch.float32))
    for name in ("first", "second"):
        sx.export(captured, tmp_path / name, target="ort-artifacts")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_the_api_is_imported_without_torch_and_onnx(artifacts: Artifacts, tmp_path: Path) -> None:
    folder = artifacts("adamw")
    script = f"""
import sys
sys.modules["torch"] = sys.modules["onnx"] = None  # an import of either fails
import numpy as np, sam_export
session = sam_export.load({str(folder)!r}, threads=1)
result = session.step(np.ones((6, 1, 4, 4), np.float32), np.array([0, 1, 2, 0, 1, 2]))
assert bool(result.finite)
assert session.state["slot.step.head.bias"] == 1
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
