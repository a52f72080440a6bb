"""Artifacts that exist already, and those that are kept from one check to the next."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import sam_export as sx
from sam_export.parity import artifacts
from tests.parity.cases import RHO, batches_for, step_of


def captured_mlp(seed: int = 0, scale: float = 1.0, **semantics: str) -> sx.CapturedStep:
    step = step_of("mlp", "float32", seed, **semantics)

    def loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return scale * nn.functional.cross_entropy(output, y)

    own = sx.TrainStep(step.model, loss, step.optimizer, semantics=step.semantics)
    return sx.capture(own, batches_for("mlp", "float32")[0])


def test_the_hash_says_what_is_computed_and_from_what() -> None:
    first = artifacts.graph_hash(captured_mlp())
    assert artifacts.graph_hash(captured_mlp()) == first
    others = [
        captured_mlp(seed=1),  # other weights
        captured_mlp(scale=2.0),  # another graph
        captured_mlp(on_nonfinite="ignore"),
    ]
    assert len({first, *map(artifacts.graph_hash, others)}) == 4


def test_what_is_kept_is_used_again_and_not_if_damaged(tmp_path: Path) -> None:
    captured = captured_mlp()
    folder = artifacts.artifact_for(captured, "onnx", "cpu", tmp_path)
    made = (folder / "step.onnx").stat().st_ino
    again = artifacts.artifact_for(captured_mlp(), "onnx", "cpu", tmp_path)
    assert again == folder
    assert (folder / "step.onnx").stat().st_ino == made
    (folder / "step.onnx").write_bytes(b"damaged")
    assert artifacts.artifact_for(captured, "onnx", "cpu", tmp_path) == folder
    assert (folder / "step.onnx").stat().st_size > 1000
    assert artifacts.artifact_for(captured, "torchscript", "cpu", tmp_path) != folder
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_refused_target_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(sx.LoweringError):
        artifacts.artifact_for(captured_mlp(), "tflite", "cpu", None)
    assert list(tmp_path.iterdir()) == []


def test_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "KEPT", 1)
    (tmp_path / "of the user").mkdir()
    os.utime(tmp_path / "of the user", (0, 0))
    first = artifacts.artifact_for(captured_mlp(), "onnx", "cpu", tmp_path)
    second = artifacts.artifact_for(captured_mlp(seed=1), "onnx", "cpu", tmp_path)
    assert not first.exists()
    assert second.exists()
    assert (tmp_path / "of the user").exists()  # the user may have named any folder as the cache


def test_a_check_uses_the_cache(tmp_path: Path) -> None:
    step, batches = step_of("mlp", "float32"), batches_for("mlp", "float32")
    for _ in range(2):
        report = sx.check_parity(step, batches, targets=["onnx"], num_steps=2, cache=tmp_path)
        assert report.ok, str(report)
    assert len(list(tmp_path.iterdir())) == 1


def exported(step: sx.TrainStep, path: Path) -> Path:
    return sx.export(sx.capture(step, batches_for("mlp", "float32")[0]), path, target="onnx").path


def test_an_artifact_that_exists_already(tmp_path: Path) -> None:
    step = step_of("mlp", "float32")
    folder = exported(step, tmp_path / "built")
    report = sx.check_parity(
        step, batches_for("mlp", "float32"), artifacts={"built": folder}, num_steps=3
    )
    assert report.ok, str(report)
    assert [target.name for target in report.targets] == ["built"]
    assert report.targets[0].resumed_after == 1
    assert not report.notes


def test_one_that_was_made_for_another_step_fails_and_says_in_what(tmp_path: Path) -> None:
    other = step_of("mlp", "float32", seed=1, decay_in_ascent=True)
    other.optimizer.param_groups[0]["lr"] = 0.7
    folder = exported(other, tmp_path / "other")
    step = step_of("mlp", "float32")
    report = sx.check_parity(
        step, batches_for("mlp", "float32"), artifacts={"other": folder}, num_steps=2
    )
    assert not report.ok
    notes = " ".join(report.notes)
    assert "exported with decay_in_ascent=True, the step has False" in notes
    assert "exported with lr 0.7; compared with 0.1, as the step has it" in notes
    assert "holds other values of" in notes


def test_only_lr_and_weights_are_other_ones_and_it_passes(tmp_path: Path) -> None:
    other = step_of("mlp", "float32", seed=1)
    other.optimizer.param_groups[0]["lr"] = 0.7
    folder = exported(other, tmp_path / "other")
    report = sx.check_parity(
        step_of("mlp", "float32"),
        batches_for("mlp", "float32"),
        artifacts={"other": folder},
        num_steps=2,
    )
    assert report.ok, str(report)
    assert len(report.notes) == 2


def test_another_model_is_a_failure_with_the_reason(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 5))
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=0.1)
    folder = exported(sx.TrainStep(model, nn.CrossEntropyLoss(), sam), tmp_path / "other")
    report = sx.check_parity(
        step_of("mlp", "float32"),
        batches_for("mlp", "float32"),
        artifacts={"other": folder, "missing": tmp_path / "missing"},
        num_steps=2,
    )
    first, second = report.targets
    assert first.error is not None
    assert "does not match the contract" in first.error
    assert second.error is not None
    assert "open: ArtifactError" in second.error


def test_a_smaller_batch_is_added_where_all_are_of_one_size() -> None:
    batches = batches_for("mlp", "float32", (16, 16))
    step = step_of("mlp", "float32")
    report = sx.check_parity(step, batches, targets=["onnx"], num_steps=4)
    assert report.batch_sizes == (16, 16, 9, 16)
    assert report.ok, str(report)
    fixed = sx.check_parity(step, batches, targets=["onnx"], num_steps=4, dynamic=None)
    assert fixed.batch_sizes == (16,) * 4
    assert fixed.ok, str(fixed)


def test_ctrl_c_leaves_what_was_compared_until_then() -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if phase == "torchscript: lock-step" and done == 2:
            raise KeyboardInterrupt

    report = sx.check_parity(
        step_of("mlp", "float32"),
        batches_for("mlp", "float32"),
        targets=["onnx", "torchscript", "onnx-training"],
        num_steps=3,
        progress=stop,
    )
    assert report.interrupted
    assert not report.ok
    first, second, third = report.targets
    assert first.ok
    assert second.error == "interrupted"
    assert second.rows
    assert third.error == "not run: interrupted"
