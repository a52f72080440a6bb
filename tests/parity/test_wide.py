"""The wide matrix: models x targets x dtypes x optimizers by `check_parity`. Half an hour.

`scripts/test-wide` runs it.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest

import sam_export as sx

pytestmark = pytest.mark.wide

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "digits_cnn": {"channels": 8, "lr": 0.03},
    "wide_resnet": {"depth": 10, "width": 1, "lr": 0.01, "num_batches": 2},
}
TARGETS = ("torch-compile", "torchscript", "aot-inductor", "onnx")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("model", MODELS)
def test_parity(model: str, optimizer: str, dtype: str, target: str) -> None:
    options = {"batch_size": 16, "num_batches": 4, **MODELS[model]}
    if optimizer == "adamw":
        options.pop("lr", None)
    recipe = importlib.import_module(f"models.{model}").recipe
    step, batches = recipe(dtype=dtype, optimizer=optimizer, **options)
    x, y = batches[-1]
    batches = [*batches, (x[:10], y[:10])]  # a second, smaller size
    report = sx.check_parity(step, batches, targets=[target], num_steps=6)
    assert report.ok, str(report)
