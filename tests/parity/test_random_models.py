"""Parity of models that draw random numbers: 20 steps, float64 as the judge, mask for mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import sam_export as sx
from models import gpt, mlp, vit

MODELS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "mlp": (mlp.recipe, {"hidden": (32, 32), "dropout": 0.3}),
    "vit": (vit.recipe, {"width": 16, "depth": 2, "batch_size": 6, "drop_path": 0.3}),
    "gpt": (gpt.recipe, {"width": 16, "depth": 2, "heads": 2, "context": 12, "batch_size": 4}),
}

# Transformers take Inductor minutes; those are for scripts/test-wide.
QUICK = [("mlp", "float32", ["torch-compile", "torchscript", "aot-inductor", "onnx"])]
WIDE = [
    ("mlp", "float64", ["torch-compile", "torchscript", "aot-inductor", "onnx"]),
    *(
        (model, dtype, [target])
        for model in ("vit", "gpt")
        for dtype in ("float32", "float64")
        for target in ("torch-compile", "torchscript", "aot-inductor", "onnx")
        if (model, dtype, target) not in (("vit", "float32", "onnx"), ("gpt", "float64", "onnx"))
    ),
]
QUICK += [("vit", "float32", ["onnx"]), ("gpt", "float64", ["onnx"])]


@pytest.mark.parametrize(
    ("model", "dtype", "targets"),
    [
        *(pytest.param(*case, id="-".join((case[0], case[1], *case[2]))) for case in QUICK),
        *(
            pytest.param(*case, id="-".join((case[0], case[1], *case[2])), marks=pytest.mark.wide)
            for case in WIDE
        ),
    ],
)
def test_parity(model: str, dtype: str, targets: list[str]) -> None:
    recipe, options = MODELS[model]
    step, batches = recipe(dtype=dtype, **options)
    assert step.semantics.generator == "philox"
    report = sx.check_parity(step, batches, targets=targets, num_steps=20)
    assert report.ok, str(report)
    rows = {row.name for target in report.targets for row in target.rows}
    assert {"counter.step", "rng.seed"} <= rows
