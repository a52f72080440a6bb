"""Every wrong step is caught, and no right one is."""

from __future__ import annotations

import pytest

import sam_export as sx
from tests.parity.cases import HYPER, RHO, batches_for, step_of
from tests.parity.loops import FAULTS, PlainLoop

NOT_WRONG = {
    ("mlp", "float32"): {"running statistics twice", "float32 arithmetic"},
    ("mlp", "float64"): {"running statistics twice"},
    ("conv", "float32"): {"float32 arithmetic"},
    ("conv", "float64"): set[str](),
}
"""Faults that change nothing: an MLP has no statistics, a float32 model is float32 already."""

RIGHT = {"mlp": (None, "reversed", "split"), "conv": (None, "reversed", "channels_last")}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_each_fault_is_caught(kind: str, dtype: str) -> None:
    step = step_of(kind, dtype)
    sessions = {
        fault: PlainLoop(step.model, RHO, **HYPER, fault=fault)
        for fault in FAULTS
        if fault not in NOT_WRONG[kind, dtype]
    }
    sessions["right"] = PlainLoop(step.model, RHO, **HYPER)
    report = sx.check_parity(step, batches_for(kind, dtype), sessions=sessions, num_steps=4)
    assert not report.ok
    passed = {target.name for target in report.targets if target.ok}
    assert passed == {"right"}, "\n".join(str(report).splitlines()[:40])
    assert [t.name for t in report.targets if t.error is not None] == []


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("seed", [0, 1])
def test_other_right_arithmetic_passes(kind: str, dtype: str, seed: int) -> None:
    step = step_of(kind, dtype, seed)
    sessions = {
        str(variant): PlainLoop(step.model, RHO, **HYPER, variant=variant)
        for variant in RIGHT[kind]
    }
    batches = batches_for(kind, dtype, seed=seed)
    report = sx.check_parity(step, batches, sessions=sessions, num_steps=20, seed=seed)
    assert report.ok, str(report)


def test_a_fault_that_only_state_carries_over_is_seen_free_running() -> None:
    step = step_of("mlp", "float32")
    loop = PlainLoop(step.model, RHO, **HYPER, fault="momentum reset in the second step")
    report = sx.check_parity(
        step, batches_for("mlp", "float32"), sessions={"loop": loop}, num_steps=4
    )
    assert {row.mode for row in report.targets[0].failed} == {"free-running"}
