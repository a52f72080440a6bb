"""``sam-export train --average``: the averaged weights of a step with `EMA`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sam_export.artifact.state_file import read_state
from sam_export.cli import main
from tests.cli.conftest import Workplace

pytest.importorskip("onnxruntime")


def test_the_averaged_weights_are_validated_and_exported(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "averaged"
    recipe = f"{workplace.recipe}:averaged"
    assert main(["export", recipe, "--target", "onnx", "--out", str(folder)]) == 0
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "kind of SAM       LookSAM(alpha=0.7), every 3 steps" in shown
    assert "averaged weights  EMA(decay=0.9, buffers='average')" in shown
    argv = ["train", str(folder), "--data", str(workplace.train), "--validate", str(workplace.test)]
    losses, weights = [], []
    for name, more in (("now", []), ("average", ["--average"])):
        model, state = tmp_path / f"{name}.onnx", tmp_path / f"{name}.safetensors"
        files = ["--export-model", str(model), "--save-state", str(state), "--epochs", "2"]
        assert main([*argv, *files, *more]) == 0
        (loss,) = re.findall(r"epoch 2/2.*validation loss ([0-9.]+)", capsys.readouterr().out)
        losses.append(float(loss))
        weights.append((model.read_bytes(), read_state(state)))
    assert losses[0] != losses[1]
    (now, held), (average, _) = weights
    assert held["0.weight"].tobytes() in now
    assert held["average.0.weight"].tobytes() in average
    assert held["0.weight"].tobytes() not in average


def test_an_average_that_is_not_there_is_refused(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", str(workplace.artifact), "--data", str(workplace.train), "--average"]
    assert main(argv) == 2
    assert "keeps no average of its weights" in capsys.readouterr().err
