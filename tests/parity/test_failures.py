"""Where a wrong step is said to go wrong first, and what the report holds of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sam_export as sx
from sam_export.parity.difference import Difference
from sam_export.parity.failures import KEPT, chosen
from sam_export.parity.report import TargetReport
from sam_export.parity.verdict import Row
from tests.parity.cases import HYPER, RHO, batches_for, step_of
from tests.parity.loops import PlainLoop


def checked(fault: str, dtype: str = "float64", steps: int = 4) -> TargetReport:
    step = step_of("conv", dtype)
    session = PlainLoop(step.model, RHO, **HYPER, fault=fault)
    report = sx.check_parity(
        step, batches_for("conv", dtype), sessions={"x": session}, num_steps=steps
    )
    return report.targets[0]


@pytest.mark.parametrize(
    ("fault", "mode", "step", "stage"),
    [
        ("other loss reported", "lock-step", 1, "loss"),
        ("no perturbation", "lock-step", 1, "perturbation_norm"),
        ("rho doubled", "lock-step", 1, "perturbation_norm"),
        ("wrong sign", "lock-step", 1, "perturbed_loss"),
        ("per-tensor norm", "lock-step", 1, "perturbed_loss"),
        ("gradient times batch size", "lock-step", 1, "slots"),
        ("decay dropped", "lock-step", 1, "slots"),
        ("momentum dropped", "lock-step", 2, "slots"),
        ("one parameter not updated", "lock-step", 1, "parameters"),
        ("frozen parameter moves", "lock-step", 1, "parameters"),
        ("nan", "lock-step", 1, "parameters"),
        ("running statistics twice", "lock-step", 1, "buffers"),
        ("momentum reset in the second step", "free-running", 2, "slots"),
    ],
)
def test_the_first_difference_is_where_the_fault_is(
    fault: str, mode: str, step: int, stage: str
) -> None:
    first = checked(fault).first_difference
    assert first is not None
    assert (first.mode, first.step, first.stage) == (mode, step, stage)


def test_a_right_step_has_no_difference() -> None:
    step = step_of("conv", "float32")
    session = PlainLoop(step.model, RHO, **HYPER, variant="channels_last")
    report = sx.check_parity(
        step, batches_for("conv", "float32"), sessions={"x": session}, num_steps=4
    )
    assert report.ok, str(report)
    assert report.targets[0].differences == ()
    assert report.targets[0].first_difference is None


def test_a_gradient_that_is_too_long_has_its_length_and_direction() -> None:
    step = step_of("mlp", "float64")
    session = PlainLoop(step.model, RHO, 0.1, 0.9, 0.0, fault="gradient times batch size")
    for group in step.optimizer.param_groups:
        group["weight_decay"] = 0.0
    report = sx.check_parity(
        step, batches_for("mlp", "float64"), sessions={"x": session}, num_steps=1
    )
    (target,) = report.targets
    found = {item.name: item for item in target.differences}["slot.momentum_buffer.a.weight"]
    assert found.length == pytest.approx(16.0, rel=1e-9), "16 examples"
    assert found.cosine == pytest.approx(1.0, abs=1e-12)
    assert found.relative == pytest.approx(15.0, rel=1e-9)
    assert found.elements == 144


def test_the_element_that_is_not_finite_is_named() -> None:
    first = checked("nan").first_difference
    assert first is not None
    assert (first.name, first.index, first.not_finite) == ("fc.bias", (0,), 1)
    assert first.note == "not finite in the target"


def test_a_start_state_that_is_not_eagers_is_described() -> None:
    step, other = step_of("mlp", "float32"), step_of("mlp", "float32", seed=9)

    class Deaf(PlainLoop):
        def set_state(self, state: Any) -> None:
            pass

    session = Deaf(other.model, RHO, **HYPER)
    report = sx.check_parity(
        step, batches_for("mlp", "float32"), sessions={"x": session}, num_steps=1
    )
    first = report.targets[0].first_difference
    assert first is not None
    assert (first.mode, first.step, first.stage) == ("start", 0, "start")
    ours = dict(step.model.named_parameters())[first.name].detach().numpy().astype(np.float64)
    theirs = dict(other.model.named_parameters())[first.name].detach().numpy()
    off = np.abs(theirs - ours)
    assert first.index == np.unravel_index(off.argmax(), off.shape)
    assert first.relative == pytest.approx(float(np.linalg.norm(off) / np.linalg.norm(ours)))


def row(name: str, step: int, badness: float) -> Row:
    return Row(name, "parameter", "lock-step", step, 1.0, badness, 0.1, badness, 1.0, "FAIL")


def test_the_report_holds_the_first_ones_and_the_worst_ones() -> None:
    rows = [row(f"p{i}", step=1 + i, badness=1e3 - i if i < 30 else 2e3 + i) for i in range(40)]
    failed = TargetReport.worst(rows)
    described = {
        (r.name, r.mode, r.step): Difference(r.name, "parameters", r.mode, r.step, r.error, 1.0)
        for r in rows
    }
    names = [item.name for item in chosen(described, failed, (), {r.name for r in rows})]
    first = [f"p{i}" for i in range(KEPT // 2)]
    worst = [f"p{i}" for i in range(40 - KEPT // 2, 40)]
    assert names == [*first, *worst]


def test_a_row_whose_arrays_are_gone_is_still_named() -> None:
    (found,) = chosen({}, [row("w", 2, 5.0)], (), {"w"})
    assert (found.name, found.step, found.error, found.index) == ("w", 2, 5.0, None)
    assert "noise of all steps" in found.note
