"""The target ``onnx-training`` as a user meets it; equality with eager: `test_target_equality`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

import sam_export as sx
from sam_export.runtime.detect import target_status
from tests.runtime.target_cases import images, make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx_training") / "step"
    step = make(torch.float32, "sgd")
    sx.export(sx.capture(step, images(6, torch.float32)), path, target="onnx-training")
    return path


def test_training_operators_are_in_the_step_and_not_in_evaluation(folder: Path) -> None:
    found = {
        name: {node.op_type for node in onnx.load(folder / name).graph.node if node.domain}
        for name in ("step.onnx", "evaluate.onnx")
    }
    assert found["step.onnx"] >= {"BatchNormInternal", "BatchNormalizationGrad"}
    assert found["evaluate.onnx"] == set()


def test_a_build_for_inference_is_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The native module of such a build has no ``Module``."""
    name = "onnxruntime.capi.onnxruntime_pybind11_state"
    monkeypatch.setitem(__import__("sys").modules, name, SimpleNamespace())
    with pytest.raises(sx.RuntimeUnavailableError, match="needs a training build") as raised:
        sx.load(folder)
    assert 'pip install "sam_export[ort-training]"' in str(raised.value)


@pytest.mark.skipif(
    bool(target_status("onnx-training").run), reason="needs a training build of ONNX Runtime"
)
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_is_fine(folder: Path) -> None:
    """Running statistics too, and what the runtime keeps of BatchNorm."""
    session, other = sx.load(folder, threads=1), sx.load(folder, threads=1)
    x, y = images(6, torch.float32)
    before = session.state
    spoilt = session.step(torch.full_like(x, torch.nan), y)
    assert not bool(spoilt.finite)
    for key, value in session.state.items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)
    for run in (session, other):
        assert bool(run.step(x, y).finite)
    for key, value in session.state.items():
        np.testing.assert_array_equal(value, other.state[key], err_msg=key)


def test_a_changed_graph_is_not_loaded(folder: Path, tmp_path: Path) -> None:
    """The runtime would end the process on some; the manifest's digest stands before it."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    model = onnx.load(copy / "step.onnx")
    node = next(node for node in model.graph.node if node.op_type == "BatchNormInternal")
    node.output.append("one more")
    onnx.save(model, copy / "step.onnx")
    with pytest.raises(sx.ArtifactError, match="is not the file that was written"):
        sx.load(copy)
