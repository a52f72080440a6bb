"""No false alarm: whatever small model comes, a right target passes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, given, settings

import sam_export as sx
from tests.parity.generated import Case, cases


def examples(count: int) -> settings:
    """The same ``count`` examples at every run; no shrinking, which would take hours."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        verbosity=Verbosity.normal,
        suppress_health_check=list(HealthCheck),
    )


def check(case: Case, targets: list[str]) -> None:
    report = sx.check_parity(case.step(), case.batches(), targets=targets, num_steps=5)
    assert report.ok, f"{case}\n{report}"


@given(case=cases())
@examples(12)
def test_quick(case: Case) -> None:
    check(case, ["onnx", "torchscript"])


@pytest.mark.wide
@given(case=cases())
@examples(200)
def test_onnx_and_torchscript(case: Case) -> None:
    check(case, ["onnx", "torchscript"])


@pytest.mark.wide
@pytest.mark.parametrize("target", ["torch-compile", "aot-inductor"])
@given(case=cases())
@examples(30)
def test_compiled(case: Case, target: str) -> None:
    check(case, [target])
