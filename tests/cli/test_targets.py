"""``sam-export targets``."""

from __future__ import annotations

import json

import pytest

from sam_export.cli import main, targets
from sam_export.runtime import detect
from sam_export.runtime.detect import MachineStatus, Missing, RuntimeStatus, TargetStatus


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [target["target"] for target in values["targets"]] == list(detect.TARGETS)
    versions = {runtime["name"]: runtime["version"] for runtime in values["runtimes"]}
    assert versions["torch"] == detect.installed_version("torch")


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status = MachineStatus(
        runtimes=(
            RuntimeStatus("torch", None),
            RuntimeStatus("onnxruntime-gpu", "1.20.0", ("CUDAExecutionProvider", "X")),
            RuntimeStatus("onnxruntime", "1.19.0", (), "two are installed"),
        ),
        targets=(
            TargetStatus("torch-compile", (Missing("torch", "pip install torch"),), ()),
            TargetStatus("onnx", (), ()),
        ),
    )
    monkeypatch.setattr(targets, "machine_status", lambda: status)
    assert main(["targets"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "torch not installed" in lines
    assert "onnxruntime-gpu 1.20.0 CUDAExecutionProvider, X" in lines
    assert "onnxruntime 1.19.0 cannot be used" in lines
    assert "torch-compile missing ready" in lines
    assert "onnx ready ready" in lines
    assert "torch-compile: exporting needs torch: pip install torch" in lines
    assert "onnxruntime: two are installed" in lines
