"""The checkpoint file of onnxruntime-training, against the runtime and its generated readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam_export.artifact import ort_checkpoint
from sam_export.artifact.ort_checkpoint import OptimizerGroup, OrtCheckpoint
from sam_export.errors import ArtifactError

pytest.importorskip("onnxruntime.training", reason="needs a training build of ONNX Runtime")

GENERATOR = np.random.default_rng(0)


def tensor(*shape: int) -> Any:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def content() -> OrtCheckpoint:
    weight = tensor(3, 4)
    return OrtCheckpoint(
        {"a/b::c.d[0]": weight, "scale": tensor()},
        {
            "double": np.array([0.1, 0.2]),
            "count": np.array(1 << 40),
            "flag": np.array([True, False]),
            "narrow": np.arange(6, dtype=np.int8).reshape(2, 1, 3),
            "empty": tensor(0, 3),
        },
        OptimizerGroup(41, 0.25, {"a/b::c.d[0]": (weight + 1, weight + 2)}),
    )


def assert_same(found: OrtCheckpoint, wanted: OrtCheckpoint) -> None:
    for part in ("trainable", "frozen"):
        ours, theirs = getattr(found, part), getattr(wanted, part)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype, name
            np.testing.assert_array_equal(ours[name], value, err_msg=name, strict=True)
    assert (found.optimizer is None) == (wanted.optimizer is None)
    if found.optimizer is not None and wanted.optimizer is not None:
        assert found.optimizer.step == wanted.optimizer.step
        assert found.optimizer.learning_rate == pytest.approx(wanted.optimizer.learning_rate)
        for name, moments in wanted.optimizer.moments.items():
            for ours, theirs in zip(found.optimizer.moments[name], moments, strict=True):
                np.testing.assert_array_equal(ours, theirs, strict=True)


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_what_is_written_is_read(with_optimizer: bool) -> None:
    wanted = content()
    if not with_optimizer:
        wanted = OrtCheckpoint(wanted.trainable, wanted.frozen)
    assert_same(OrtCheckpoint.from_bytes(wanted.to_bytes()), wanted)


def test_the_runtime_reads_it_and_writes_the_same(tmp_path: Path) -> None:
    from onnxruntime.training.api import CheckpointState

    wanted = content()
    (tmp_path / "ours").write_bytes(wanted.to_bytes())
    state = CheckpointState.load_checkpoint(tmp_path / "ours")
    for name, parameter in state.parameters:
        source = wanted.trainable if parameter.requires_grad else wanted.frozen
        np.testing.assert_array_equal(parameter.data, source[name], strict=True)
    CheckpointState.save_checkpoint(state, tmp_path / "theirs", include_optimizer_state=True)
    assert_same(OrtCheckpoint.from_bytes((tmp_path / "theirs").read_bytes()), wanted)


def test_onnxblock_writes_what_we_read(tmp_path: Path) -> None:
    from onnx import numpy_helper
    from onnxruntime.training import onnxblock

    wanted = OrtCheckpoint(content().trainable, content().frozen)
    tensors = [
        [numpy_helper.from_array(value, name) for name, value in part.items()]
        for part in (wanted.trainable, wanted.frozen)
    ]
    onnxblock.save_checkpoint(tuple(tensors), tmp_path / "checkpoint")
    assert_same(OrtCheckpoint.from_bytes((tmp_path / "checkpoint").read_bytes()), wanted)
    onnxblock.save_checkpoint(tuple(tensors), tmp_path / "nominal", nominal_checkpoint=True)
    with pytest.raises(ArtifactError, match="does not hold its tensors"):
        OrtCheckpoint.from_bytes((tmp_path / "nominal").read_bytes())


def test_the_generated_reader_agrees() -> None:
    """Slot numbers and file identifier against the classes that ONNX Runtime ships."""
    schema = pytest.importorskip(
        "onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.Checkpoint"
    )
    data = content().to_bytes()
    assert schema.Checkpoint.CheckpointBufferHasIdentifier(data, 0)
    root = schema.Checkpoint.GetRootAs(data, 0)
    module = root.ModuleState()
    assert (root.Version(), module.IsNominalState(), module.HasExternalData()) == (2, False, False)
    names = [module.RequiresGradParams(i).Name() for i in range(module.RequiresGradParamsLength())]
    assert names == [b"a/b::c.d[0]", b"scale"]
    group = root.OptimizerGroups(0)
    assert (group.GroupName(), group.Step(), group.InitialLearningRate()) == (b"group0", 41, 0.25)
    assert group.OptimizerStates(0).Momentums(1).Name() == b"momentum1"


def test_a_file_that_is_cut_short_or_foreign_is_refused() -> None:
    data = content().to_bytes()
    for length in (0, 6, 40, len(data) // 2, len(data) - 1):
        with pytest.raises(ArtifactError, match="checkpoint"):
            OrtCheckpoint.from_bytes(data[:length])
    with pytest.raises(ArtifactError, match="not a checkpoint of onnxruntime-training"):
        OrtCheckpoint.from_bytes(b"PK\3\4" + data[4:8].lower() + data[8:])


def test_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_checkpoint, "VERSION", 3)
    data = content().to_bytes()
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="layout 3; this version of sam_export reads 2"):
        OrtCheckpoint.from_bytes(data)


def test_what_does_not_fit_into_a_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_checkpoint, "LARGEST", (1 << 20) + 100)
    with pytest.raises(ArtifactError, match="does not fit into one file"):
        content().to_bytes()
