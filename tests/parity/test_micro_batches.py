"""Parity of steps that divide their batch, on every target; the oracle has a loop of its own."""

from __future__ import annotations

from typing import Any

import pytest

import sam_export as sx
from sam_export.parity.subjects import with_unseen_size
from tests.parity.cases import batches_for, step_of
from tests.parity.test_check import EagerSession

SIZES = (16, 16, 8)
CELLS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("conv", "batch", "onnx", {"decay_in_ascent": True}),
    ("conv", "micro_batch", "torchscript", {"clip_norm": 0.5, "running_stats": "both"}),
    ("mlp", "micro_batch", "onnx", {"clip_norm": 0.05}),
    ("mlp", "batch", "torch-compile", {}),
    ("mlp", "micro_batch", "aot-inductor", {}),
    ("conv", "micro_batch", "onnx-training", {}),
]


@pytest.mark.parametrize(("kind", "per", "target", "semantics"), CELLS)
def test_targets_in_float64(kind: str, per: str, target: str, semantics: dict[str, Any]) -> None:
    """Both rollouts and the laws; batches of two sizes."""
    step = step_of(kind, "float64", micro_batches=2, perturbation_per=per, **semantics)
    report = sx.check_parity(
        step, batches_for(kind, "float64", SIZES), targets=[target], num_steps=3, isolate=False
    )
    assert report.ok, str(report)


@pytest.mark.needs("ort-artifacts")
@pytest.mark.parametrize("per", ["batch", "micro_batch"])
def test_ort_artifacts(per: str) -> None:
    """In float32, which is all that it has."""
    step = step_of("conv", "float32", micro_batches=2, perturbation_per=per)
    report = sx.check_parity(
        step, batches_for("conv", "float32", SIZES), targets=["ort-artifacts"], num_steps=3,
        isolate=False,
    )  # fmt: skip
    assert report.ok, str(report)


@pytest.mark.parametrize(
    "other",
    [
        {"micro_batches": 1},
        {"micro_batches": 4},
        {"perturbation_per": "batch"},
    ],
)
def test_another_division_is_another_step(other: dict[str, Any]) -> None:
    """The check sees it: in a model without batch statistics the perturbation alone tells."""
    right = {"micro_batches": 2, "perturbation_per": "micro_batch"}
    step = step_of("mlp", "float64", **right)
    sessions = {
        "right": EagerSession(step_of("mlp", "float64", **right)),
        "wrong": EagerSession(step_of("mlp", "float64", **{**right, **other})),
    }
    report = sx.check_parity(
        step, batches_for("mlp", "float64", SIZES), sessions=sessions, num_steps=2
    )
    assert [target.ok for target in report.targets] == [True, False], str(report)


def test_the_unseen_size_is_a_multiple() -> None:
    """As the step demands."""
    sizes = [len(x) for x, _ in with_unseen_size(batches_for("mlp", "float64", (16, 16)), 4, 4)]
    assert sizes == [16, 16, 12]
    assert len(with_unseen_size(batches_for("mlp", "float64", (12, 12)), 4, 4)) == 2
