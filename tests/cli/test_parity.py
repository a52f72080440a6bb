"""``sam-export parity``."""

from __future__ import annotations

import html
import json
import shlex
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
    assert shlex.split(keywords.pop("command"))[:3] == ["sam-export", *argv[:2]]
    expected = {"targets": ["onnx"], "num_steps": 5, "device": "cuda:1", "dynamic": "batch"}
    assert keywords == expected


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
    page, note = tmp_path / "a page.html", tmp_path / "note.md"
    more = ["--json", str(out), "--html", str(page), "--markdown", str(note)]
    assert main([*argv, *more]) == 0
    printed = capsys.readouterr().out
    assert "onnx" in printed
    assert all(f"written: {path}" in printed for path in (out, page, note))
    values = json.loads(out.read_text())
    assert shlex.split(values["command"]) == ["sam-export", *argv, *more]
    assert html.escape(values["command"]) in page.read_text()
    assert values["command"] in note.read_text()


def test_a_folder_that_is_not_there_is_said_before_the_work(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "no" / "parity.html"
    argv = ["parity", f"{workplace.recipe}:recipe", "--targets", "onnx", "--html", str(path)]
    assert main(argv) == 2
    assert f"{path} cannot be written: its folder does not exist" in capsys.readouterr().err
