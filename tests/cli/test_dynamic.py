"""``--dynamic`` of ``sam-export export`` and ``parity``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sam_export.artifact.folder import open_artifact
from sam_export.cli import main
from sam_export.cli.dynamic import parse_dynamic
from sam_export.cli.errors import CommandError
from tests.cli.conftest import Workplace


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("batch", "batch"),
        ("none", None),
        ("x.0=batch", {"x": {0: "batch"}}),
        (
            "x.0=batch, x.1=time,a.b.2=time",
            {"x": {0: "batch", 1: "time"}, "a.b": {2: "time"}},
        ),
    ],
)
def test_forms(text: str, wanted: Any) -> None:
    assert parse_dynamic(text) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not of the form"),
        ("x", "'x' is not of the form"),
        ("x=batch", "'x=batch' is not of the form"),
        ("x.-1=batch", "'x.-1=batch' is not of the form"),
        ("x.0=", "'x.0=' is not of the form"),
        ("x.0=my batch", "is not of the form"),
        ("x.0=a,,x.1=b", "'' is not of the form"),
        ("x.0=a,x.0=b", "x.0 is given twice"),
    ],
)
def test_other_forms_are_refused(text: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        parse_dynamic(text)


def test_export_and_parity_take_it(workplace: Workplace, tmp_path: Path) -> None:
    argv = ["--dynamic", "input.0=rows,target.0=rows"]
    recipe, out = f"{workplace.recipe}:recipe", tmp_path / "artifact"
    assert main(["export", recipe, "--out", str(out), *argv]) == 0
    assert open_artifact(out).contract.dims == {"rows": 1}
    assert main(["parity", recipe, "--targets", "onnx", "--steps", "2", *argv]) == 0


def test_an_unknown_input_is_named(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", f"{workplace.recipe}:recipe", "--out", str(tmp_path / "artifact")]
    assert main([*argv, "--dynamic", "z.0=batch"]) == 2
    assert "dynamic names z; the batch has input, target" in capsys.readouterr().err
