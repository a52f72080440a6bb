"""``sam-export parity``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sam_export
from sam_export.cli import main
from sam_export.errors import ParityError
from tests.cli.conftest import Workplace


class Report:
    """Stands for a `ParityReport`."""

    def __init__(self, ok: bool) -> None:
        self.ok = ok

    def __str__(self) -> str:
        return f"the report: {self.ok}"

    def to_json(self, path: str) -> None:
        """Writes the verdict."""
        Path(path).write_text(json.dumps({"ok": self.ok}))


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_exit_code_is_the_verdict(
    ok: bool,
    code: int,
    workplace: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[tuple[int, dict[str, Any]]] = []

    def check(_: Any, batches: Any, **keywords: Any) -> Report:
        calls.append((len(batches), keywords))
        return Report(ok)

    monkeypatch.setitem(vars(sam_export), "check_parity", check)
    out = tmp_path / "report.json"
    argv = ["parity", f"{workplace.recipe}:recipe", "--set", "batches=9", "--targets", " onnx"]
    assert main([*argv, "--steps", "5", "--device", "cuda:1", "--json", str(out)]) == code
    assert f"the report: {ok}" in capsys.readouterr().out
    assert json.loads(out.read_text()) == {"ok": ok}
    ((count, keywords),) = calls
    assert count == 5
    del keywords["progress"]
    assert keywords == {"targets": ["onnx"], "num_steps": 5, "device": "cuda:1"}


def test_could_not_compare(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(*_: Any, **__: Any) -> Report:
        raise ParityError("The oracle cannot run this loss.")

    monkeypatch.setitem(vars(sam_export), "check_parity", check)
    assert main(["parity", f"{workplace.recipe}:recipe", "--targets", "onnx"]) == 2
    assert capsys.readouterr().err.endswith("error: The oracle cannot run this loss.\n")


@pytest.mark.parametrize("targets", ["", ",", "onnx,onnx", "onnx,tensorflow"])
def test_wrong_targets(
    targets: str, workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", f"{workplace.recipe}:recipe", "--targets", targets]) == 2
    assert (
        "expected names out of torch-compile, torchscript, aot-inductor, onnx"
        in capsys.readouterr().err
    )


def test_wrong_number_of_steps(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", f"{workplace.recipe}:recipe", "--steps", "0"]) == 2
    assert "--steps 0: at least 1" in capsys.readouterr().err


def test_real_parity_of_the_onnx_target(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    argv = ["parity", f"{workplace.recipe}:recipe", "--targets", "onnx", "--steps", "3"]
    assert main([*argv, "--json", str(out)]) == 0
    assert "onnx" in capsys.readouterr().out
    json.loads(out.read_text())


def test_locate_goes_to_the_failed_targets(
    workplace: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A wrong form fails the check and is then found; the exit code is still the check's."""
    import torch

    from sam_export.lower.onnx_ops.table import FORMS
    from tests.parity.test_locate import reproduced

    target = torch.ops.aten.tanh_backward.default

    def wrong(gradient: Any, output: Any) -> Any:
        from onnxscript import opset18 as op

        slope = op.Sub(op.Constant(value_float=1.5), op.Mul(output, output))
        return op.Mul(gradient, slope)

    wrong.__annotations__ = {}
    monkeypatch.setitem(FORMS, target, wrong)
    out = tmp_path / "found"
    argv = ["parity", f"{workplace.recipe}:recipe", "--targets", "onnx", "--steps", "2"]
    assert main([*argv, "--locate", str(out)]) == 1
    text = capsys.readouterr().out
    assert "aten::tanh_backward" in text
    assert reproduced(str(out / "onnx"))[0] == 1
    assert main([*argv, "--locate", str(out)]) == 2
    assert "there already" in capsys.readouterr().err
