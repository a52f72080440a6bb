"""A small report with everything that a page has to show, made by hand: no check is run."""

from __future__ import annotations

from typing import Any

from sam_export.parity.difference import Difference
from sam_export.parity.report import ParityReport, TargetReport
from sam_export.parity.series import TensorSeries
from sam_export.parity.tolerances import Tolerances
from sam_export.parity.verdict import Row

EVIL = "slot.</td><script>alert(`1`)</script>|x&amp;\"'"
"""A name that breaks out of HTML and of a Markdown table where it is not escaped."""


def row(name: str, role: str, mode: str, error: float, verdict: str, note: str = "") -> Row:
    return Row(name, role, mode, 2, 0.5, error, 1e-8, error / 0.5, 1e-6, verdict, 0, note)  # type: ignore[arg-type]


def series(name: str, mode: str, *ratio: float | None) -> TensorSeries:
    relative = tuple(None if r is None else r * 1e-6 for r in ratio)
    absent = tuple(step for step, r in enumerate(ratio, 1) if r is None)
    return TensorSeries(name, mode, relative, ratio, None, absent, None)  # type: ignore[arg-type]


def good(name: str = "onnx") -> TargetReport:
    rows = (
        row("a.weight", "parameter", "lock-step", 1e-8, "ok"),
        row("a.weight", "parameter", "free-running", 2e-8, "ok"),
        row("a.bias", "parameter", "free-running", 1e-9, "noise"),
    )
    held = (
        series("a.weight", "lock-step", 0.01, 0.02, 0.0),
        series("a.weight", "free-running", 0.01, 0.02, 0.03),
    )
    return TargetReport(
        name, "CPUExecutionProvider", rows, (1e-8,) * 3, (1e-8, 1e-7, 1e-6), None, 1.5, series=held
    )


def bad(name: str = "torch-compile") -> TargetReport:
    inf = float("inf")
    rows = (
        row("a.weight", "parameter", "lock-step", 1e-3, "FAIL"),
        row(EVIL, "slot", "lock-step", inf, "FAIL", "not finite in the target"),
        row("loss", "metric", "lock-step", 1e-8, "ok"),
    )
    held = (
        series("loss", "lock-step", 0.1, 0.2, None),
        series(EVIL, "lock-step", None, inf, inf),
        series("a.weight", "lock-step", 0.1, 1000.0, 2.0),
    )
    first = Difference(
        EVIL, "slots", "lock-step", 2, inf, inf, "not finite in the target", 6, 1, 1, (1, 2),
        0.25, 0.5, float("nan"), 0.875, 1.25, 3, 0.5, (5, 0, 0, 0, 0, 0, 0, 0, 0, 1),
    )  # fmt: skip
    second = Difference("a.weight", "parameters", "lock-step", 2, 1e-3, 2e-3, "gone <b>")
    return TargetReport(
        name, None, rows, (1e-8, 2e-3, 1e-3), (1e-8,) * 3, None, 2.5,
        series=held, differences=(first, second),
    )  # fmt: skip


def broken(name: str = "aot-inductor") -> TargetReport:
    return TargetReport(name, None, (), (), (), "build: RuntimeError: <i>no</i> compiler", 0.1)


def report(*targets: TargetReport, **changes: Any) -> ParityReport:
    given: dict[str, Any] = {
        "targets": targets or (good(), bad(), broken()),
        "dtype": "float32",
        "num_steps": 3,
        "batch_sizes": (16, 16, 7),
        "seed": 4,
        "optimizer": "AdamW",
        "semantics": {"running_stats": "ascent"},
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "threads": 1,
        "notes": ("judged by <eager>",),
        "tolerances": Tolerances(),
        "ledger": {
            "seeds": {"check": 4},
            "threads": {"torch": 1},
            "versions": {"torch": "2.13.0"},
            "hardware": {"cpu": "A & B", "gpus": []},
            "numerics": {"cudnn_conv_float32": "tf32"},
            "environment": {},
            "targets": {"onnx": {"graphs": {"step.onnx": "ab" * 32}}, "torch-compile": {}},
        },
        "command": "sam-export parity 'a b.py:recipe' && echo `x`",
    }
    return ParityReport(**{**given, **changes})
