"""Every model of the repository in onnxruntime-training, both targets: 20 steps, two batch sizes.

In float32: these kernels have no other dtype.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import sam_export as sx
from tests.parity.test_models_onnx import MODELS, VARIANTS, case

OTHERS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "digits_cnn": {"channels": 8, "lr": 0.03},
    "wide_resnet": {"depth": 10, "width": 1, "lr": 0.01},
    "vit": {},
    "gpt": {"context": 10, "width": 8, "depth": 1, "heads": 2},
}
TARGETS = ("onnx-training", "ort-artifacts")


def batches_of(name: str) -> tuple[sx.TrainStep, list[tuple[torch.Tensor, ...]]]:
    if name not in OTHERS:
        return case(name, "float32")
    recipe = importlib.import_module(f"models.{name}").recipe
    step, batches = recipe(dtype="float32", num_batches=2, batch_size=8, **OTHERS[name])
    return step, [batches[0], tuple(tensor[:3] for tensor in batches[1])]


@pytest.mark.wide
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [*MODELS, *VARIANTS, *OTHERS])
def test_twenty_steps(name: str, target: str) -> None:
    step, batches = batches_of(name)
    report = sx.check_parity(step, batches, targets=[target], num_steps=20)
    assert report.ok, str(report)
    assert report.batch_sizes == (len(batches[0][0]), 3) * 10
    trained = {name for name, p in step.model.named_parameters() if p.requires_grad}
    assert trained <= {row.name for row in report.targets[0].rows}


def test_every_model_is_here() -> None:
    files = {path.stem for path in (Path(__file__).parents[2] / "models").glob("[a-z]*.py")}
    found = {name for name in files if hasattr(importlib.import_module(f"models.{name}"), "recipe")}
    assert found == {*MODELS, *OTHERS}
