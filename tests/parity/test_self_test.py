"""The self-test: every fault is caught as a real artifact, and a check that lets one by is seen."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sam_export as sx
from sam_export.cli import main
from sam_export.errors import ParityError
from sam_export.parity import self_test as module
from sam_export.parity.faults import SELECTOR
from sam_export.parity.mutants import MUTANTS, NUMBERS
from sam_export.parity.mutated_step import captured_mutants
from sam_export.parity.self_test import CONTROL, self_test
from sam_export.parity.self_test_models import batches_of, step_of
from sam_export.parity.self_test_report import Outcome, SelfTestReport
from sam_export.parity.tolerances import Tolerances

REQUIRED = {
    "no perturbation",
    "wrong sign",
    "w not restored",
    "first gradient reused",
    "per-tensor norm",
    "decay dropped",
    "momentum dropped",
    "statistics twice",
    "gradient times batch size",
    "stale slot",
    "swapped slots",
    "not a number",
}
"""The faults that the design lists (section 6.5)."""


def check(report: SelfTestReport, targets: list[str]) -> None:
    """Every fault of the table was caught in every target, in each model in which it is one."""
    assert report.ok, str(report)
    found = {(o.mutant, o.model, o.target): o.result for o in report.outcomes}
    expected = {
        (mutant.name, kind, target): "caught"
        for mutant in MUTANTS
        for kind in mutant.models
        for target in targets
    }
    expected |= {
        (CONTROL, kind, target): "passed" for kind in ("conv", "mlp") for target in targets
    }
    assert found == expected
    assert all(o.margin > 1.0 for o in report.outcomes if o.mutant != CONTROL)
    assert all(o.margin <= 1.0 for o in report.outcomes if o.mutant == CONTROL)


@functools.cache
def captured_once(kind: Any) -> sx.CapturedStep:
    return captured_mutants(kind, step_of(kind), batches_of(kind)[0])


_loaded: dict[tuple[int, str], sx.Session] = {}


def loaded_once(captured: sx.CapturedStep, device: str, target: str) -> sx.Session:
    key = id(captured), target  # captured steps are kept by the cache above
    if key not in _loaded:
        _loaded[key] = sx.load(captured, device, target)
    _loaded[key].set_state(captured.state)
    return _loaded[key]


@pytest.fixture(autouse=True)
def _made_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures and loads each artifact once: a session is reset to the start by the check."""
    if "wide" not in request.keywords:
        monkeypatch.setattr(module, "captured_mutants", lambda kind, *_: captured_once(kind))
        monkeypatch.setattr(module, "load", loaded_once)


def test_the_table_has_the_faults_of_the_design() -> None:
    assert set(NUMBERS) >= REQUIRED
    assert len(NUMBERS) == len(MUTANTS) >= 18


def test_each_fault_is_caught_on_the_quick_targets(capsys: pytest.CaptureFixture[str]) -> None:
    targets = ["onnx", "torchscript"]
    report = self_test(targets, num_steps=4)
    check(report, targets)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) >= 2 * (len(MUTANTS) + 1) + 2
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert len(values["outcomes"]) == len(report.outcomes)


@pytest.mark.wide
@pytest.mark.parametrize(
    "target",
    ["onnx", "torchscript", "torch-compile", "aot-inductor", "onnx-training", "ort-artifacts"],
)
def test_each_fault_is_caught(target: str) -> None:
    check(self_test([target]), [target])


@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_with_the_selector_at_0_the_step_is_the_right_one_bit_for_bit(kind: Any) -> None:
    """On one engine; and with any other number something is not."""
    batch = batches_of(kind)[0]
    plain = sx.capture(step_of(kind), batch)
    mutated = captured_once(kind)
    expected = run(plain, {}, batch)
    right = found = run(mutated, {SELECTOR: torch.tensor(0)}, batch)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    ((frozen, value),) = [item for item in found.items() if item[0] not in expected]
    assert frozen in ("next.shift", "next.scale")
    assert torch.equal(value, torch.tensor(plain.state[frozen.removeprefix("next.")]))
    # A fault may need a state (momentum) or a batch (NaN) that the first step has not.
    quiet = []
    for mutant in MUTANTS:
        if kind in mutant.models:
            found = run(mutated, {SELECTOR: torch.tensor(NUMBERS[mutant.name])}, batch)
            same = all(torch.equal(found[name], value) for name, value in right.items())
            quiet += [mutant.name] if same else []
    later = {"momentum dropped", "momentum reset", "bias correction stuck", "finite always true"}
    assert set(quiet) <= later


def run(captured: sx.CapturedStep, state: Any, batch: Any) -> dict[str, torch.Tensor]:
    """The outputs of the captured graph itself, by name."""
    spec = captured.contract.program("step")
    given = {name: torch.tensor(value) for name, value in captured.state.items()}
    given |= state | {
        f"hyper.{item.name}": torch.tensor(item.defaults, dtype=torch.float64)
        for item in captured.contract.hyper
    }
    given |= dict(zip((item.name for item in captured.contract.batch), batch, strict=True))
    program = captured.programs["step"].module(check_guards=False)
    values = program(*(given[name] for name in spec.inputs))
    return dict(zip((output.name for output in spec.outputs), values, strict=True))


# -- a check that does not work, and targets that do not ----------------------------------------


def blunt(*arguments: Any, **keywords: Any) -> sx.ParityReport:
    """A check that compares as many do: changes to 10 %."""
    loose = Tolerances(kernel=1e9, drift=0.1)
    return sx.check_parity(*arguments, **keywords, tolerances=loose)


def test_a_blunt_check_lets_faults_by(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "check_parity", blunt)
    out = tmp_path / "report.json"
    assert main(["parity", "--self-test", "--targets", "onnx", "--json", str(out)]) == 1
    values = json.loads(out.read_text())
    slipped = {o["mutant"] for o in values["outcomes"] if o["result"] == "slipped"}
    assert "gradient in half precision" in slipped
    assert "gradient times batch size" not in slipped
    assert not values["ok"]
    printed = capsys.readouterr().out
    assert "SLIPPED" in printed
    assert "FAILED" in printed


def test_a_right_step_that_fails_is_a_false_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    def nervous(*arguments: Any, **keywords: Any) -> sx.ParityReport:
        strict = Tolerances(kernel=0.0, drift=0.0, factor=1e-6)
        return sx.check_parity(*arguments, **keywords, tolerances=strict)

    monkeypatch.setattr(module, "check_parity", nervous)
    report = self_test(["onnx"], num_steps=1)
    assert {o.mutant for o in report.slipped} == {CONTROL}
    assert not report.ok
    assert "FALSE ALARM" in str(report)


def test_a_target_that_does_not_work_is_in_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(captured: Any, device: str, target: str) -> Any:
        if target == "onnx":
            raise sx.LoweringError("no such operator")
        raise OSError("no compiler")

    monkeypatch.setattr(module, "load", load)
    report = self_test(["onnx", "torchscript"])
    assert {(o.target, o.result) for o in report.outcomes} == {
        ("onnx", "refused"),
        ("torchscript", "error"),
    }
    assert not report.ok
    assert str(report).count("no such operator") == 2  # once for each model
    assert main(["parity", "--self-test", "--targets", "onnx,torchscript"]) == 2
    assert "no compiler" in capsys.readouterr().out


def test_an_error_while_it_runs_is_no_catch() -> None:
    outcome = Outcome("wrong sign", "mlp", "onnx", "error", note="lock-step step 1: OSError")
    report = SelfTestReport(("onnx",), 1, (outcome,))
    assert not report.ok
    assert report.not_run == (outcome,)
    assert report.slipped == ()


@pytest.mark.parametrize("targets", [[], ["onnx", "onnx"]])
def test_targets_are_given_once(targets: list[str]) -> None:
    with pytest.raises(ParityError, match="expected at least one, each once"):
        self_test(targets)


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    report = SelfTestReport(("onnx",), 1, ())
    with pytest.raises(ParityError, match="cannot be written"):
        report.to_json(tmp_path / "missing" / "report.json")


def test_the_command_wants_a_recipe_or_the_self_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "--targets", "onnx"]) == 2
    assert "give a RECIPE" in capsys.readouterr().err
    assert main(["parity", "a.py:recipe", "--self-test", "--targets", "onnx"]) == 2
    assert "models of its own" in capsys.readouterr().err
