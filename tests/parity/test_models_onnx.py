"""The models that people train, in ONNX: several steps, two batch sizes, two sequence lengths.

Each is float64's judge word for word: what is off by a float32 constant somewhere fails here.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import sam_export as sx

MODELS: dict[str, dict[str, Any]] = {
    "resnet": {"depths": (1, 1), "channels": 8, "batch_size": 6},
    "mobile_net": {"channels": 4, "batch_size": 6},
    "convnext": {"channels": 4, "kernel": 3, "batch_size": 6},
    "swin": {"depths": (2,), "width": 4, "batch_size": 4},
    "unet": {"channels": 4, "levels": 1, "batch_size": 4},
    "mixer": {"width": 8, "depth": 1, "batch_size": 6},
    "bert": {"context": 10, "width": 8, "depth": 1, "batch_size": 4},
    "lstm": {"context": 5, "width": 4, "hidden": 6, "batch_size": 6},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet without groups": ("resnet", {"groups": 1}),
    "mobile_net silu": ("mobile_net", {"activation": "silu", "optimizer": "adamw"}),
    "convnext 7x7": ("convnext", {"kernel": 7}),
    "swin two stages": ("swin", {"depths": (2, 1), "width": 8}),
    "unet transposed": ("unet", {"transposed": True, "levels": 2}),
    "lstm both ways": ("lstm", {"bidirectional": True, "layers": 2, "dropout": 0.2}),
}
SEQUENCES: dict[str, dict[str, dict[int, str]]] = {
    "gpt": {name: {0: "batch", 1: "time"} for name in ("x", "target")},
    "bert": {name: {0: "batch", 1: "time"} for name in ("x", "mask", "target")},
    "lstm": {"x": {0: "batch", 1: "time"}, "target": {0: "batch"}},
}
SMALL: dict[str, dict[str, Any]] = {
    "gpt": {"context": 10, "width": 8, "depth": 1, "heads": 2},
    "bert": MODELS["bert"],
    "lstm": MODELS["lstm"],
    "lstm both ways": {**MODELS["lstm"], "bidirectional": True, "layers": 2, "dropout": 0.2},
    "lstm gru": {**MODELS["lstm"], "kind": "gru", "bidirectional": True},
}


def case(name: str, dtype: str) -> tuple[sx.TrainStep, list[tuple[torch.Tensor, ...]]]:
    """The step, and batches of two sizes."""
    model, changes = VARIANTS.get(name, (name, {}))
    options = {**MODELS[model], **changes}
    step, batches = importlib.import_module(f"models.{model}").recipe(
        dtype=dtype, num_batches=2, **options
    )
    return step, [batches[0], tuple(tensor[:3] for tensor in batches[1])]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(pytest.param(name, "float64", id=f"{name}-float64") for name in MODELS),
        *(
            pytest.param(name, "float32", id=f"{name}-float32", marks=pytest.mark.wide)
            for name in MODELS
        ),
        *(
            pytest.param(name, dtype, id=f"{name}-{dtype}", marks=pytest.mark.wide)
            for name in VARIANTS
            for dtype in ("float32", "float64")
        ),
    ],
)
def test_several_steps_at_two_batch_sizes(name: str, dtype: str) -> None:
    step, batches = case(name, dtype)
    report = sx.check_parity(step, batches, targets=["onnx"], num_steps=4)
    assert report.ok, str(report)
    assert report.batch_sizes == (len(batches[0][0]), 3) * 2
    trained = {name for name, p in step.model.named_parameters() if p.requires_grad}
    assert trained <= {row.name for row in report.targets[0].rows}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("gpt", "float64"),
        pytest.param("bert", "float64"),
        pytest.param("lstm", "float64"),
        pytest.param("gpt", "float32", marks=pytest.mark.wide),
        pytest.param("bert", "float32", marks=pytest.mark.wide),
        pytest.param("lstm", "float32", marks=pytest.mark.wide),
        pytest.param("lstm gru", "float64", marks=pytest.mark.wide),
        pytest.param("lstm both ways", "float64", marks=pytest.mark.wide),
        pytest.param("lstm both ways", "float32", marks=pytest.mark.wide),
    ],
)
def test_two_sequence_lengths(name: str, dtype: str) -> None:
    model = name.split()[0]
    recipe = importlib.import_module(f"models.{model}").recipe
    options = {**SMALL[name], "batch_size": 4}
    step, batches = recipe(dtype=dtype, num_batches=2, **options)
    # Fewer sequences, and shorter ones; the class of an LSTM's passage has no length.
    shorter = tuple(tensor[:3, :4] if tensor.dim() > 1 else tensor[:3] for tensor in batches[1])
    report = sx.check_parity(
        step, [batches[0], shorter], targets=["onnx"], num_steps=4, dynamic=SEQUENCES[model]
    )
    assert report.ok, str(report)
    assert report.batch_sizes == (4, 3) * 2


@pytest.mark.wide
@pytest.mark.parametrize("name", MODELS)
def test_torchscript(name: str) -> None:
    step, batches = case(name, "float32")
    report = sx.check_parity(step, batches, targets=["torchscript"], num_steps=4)
    assert report.ok, str(report)
