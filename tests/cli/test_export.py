"""``sam-export export``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from sam_export.artifact.folder import open_artifact
from sam_export.cli import export, main
from sam_export.runtime.detect import Missing
from tests.cli.conftest import Workplace


def test_artifact_is_written(workplace: Workplace) -> None:
    artifact = open_artifact(workplace.artifact)
    assert artifact.target == "onnx"
    assert [spec.shape for spec in artifact.contract.batch] == [("batch", 4), ("batch",)]


def test_settings_overwrite_and_fixed_batch(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "artifact"
    argv = ["export", f"{workplace.recipe}:recipe", "--out", str(out), "--target", "torch-compile"]
    assert main([*argv, "--set", "optimizer=AdamW", "--dynamic", "none"]) == 0
    captured = capsys.readouterr()
    assert f"{out}: torch-compile, programs step," in captured.out
    assert "capture: " in captured.err
    artifact = open_artifact(out)
    assert artifact.contract.optimizer == "AdamW"
    assert [spec.shape for spec in artifact.contract.batch] == [(6, 4), (6,)]

    assert main(argv) == 2
    assert "exists already. Choose another folder, or --overwrite" in capsys.readouterr().err
    assert open_artifact(out).contract.optimizer == "AdamW"

    assert main([*argv, "--overwrite", "--set", "hidden=5"]) == 0
    assert open_artifact(out).contract.optimizer == "SGD"


def test_stages_are_exported_when_asked_for(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "artifact"
    argv = ["export", f"{workplace.recipe}:recipe", "--out", str(out), "--staged"]
    assert main(argv) == 0
    assert "ascent, descent, update," in capsys.readouterr().out
    artifact = open_artifact(out)
    assert [spec.role for spec in artifact.contract.carried if spec.role != "gradient"] == []
    assert main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert "perturbed_gradient." in text
    assert "Outputs of descent" in text


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_batches", "returned no batches"),
        ("not_a_step", "returned a str as its first value; expected a sam_export.TrainStep"),
        ("no_pair", "returned a TrainStep; expected (TrainStep, batches)"),
        ("broken", "raised IndexError: list index out of range"),
        ("not_a_function", "is a int, not a function"),
        ("nothing", "has no function 'nothing'; it has recipe, averaged, no_batches"),
    ],
)
def test_bad_recipe(
    function: str,
    message: str,
    workplace: Workplace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "deep" / "artifact"
    assert main(["export", f"{workplace.recipe}:{function}", "--out", str(out)]) == 2
    text = capsys.readouterr().err
    assert message in text
    assert "Traceback" not in text
    assert not out.parent.exists()


def test_error_of_the_package_is_shown(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", f"{workplace.recipe}:no_parameters", "--out", str(tmp_path / "artifact")]
    assert main([*argv, "--traceback"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert "\nerror: " in text


def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = (Missing("torch >= 2.11", "pip install it"), Missing("onnx >= 1", "pip install it"))
    monkeypatch.setattr(export, "target_status", lambda _: SimpleNamespace(export=missing))
    assert main(["export", "recipe.py:recipe", "--out", str(tmp_path / "artifact")]) == 2
    assert capsys.readouterr().err == (
        "error: Exporting to onnx needs torch >= 2.11, onnx >= 1. Install: pip install it.\n"
    )
