"""Small steps that are captured in stages, and the sessions of their artifacts, made once."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sam_export as sx

TARGETS = ["onnx", "torchscript"]
"""Quick to build; the others have their turn in `test_the_stages_are_the_step`."""


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layers: dict[str, list[nn.Module]] = {
        "plain": [nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)],
        "norm": [nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)],
        "dropout": [nn.Linear(12, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3)],
    }
    return nn.Sequential(*layers[kind])


def step_over(
    kind: str,
    dtype: torch.dtype = torch.float64,
    optimizer: Mapping[str, Any] | None = None,
    semantics: Mapping[str, Any] | None = None,
    **others: Any,
) -> sx.TrainStep:
    model = model_of(kind).to(dtype)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, **(optimizer or {})}
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, **options)
    chosen = sx.Semantics(**(semantics or {}))
    return sx.TrainStep(model, nn.CrossEntropyLoss(), sam, semantics=chosen, seed=5, **others)


def batch_of(size: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(size, 12, generator=generator, dtype=torch.float64).to(dtype)
    return [x, torch.randint(3, (size,), generator=generator)]


_ROOT = tempfile.TemporaryDirectory(prefix="sam_export-staged-")


def folder_of(target: str, given: str) -> Path:
    """The artifact of `session_of`'s arguments, made once."""
    return Path(_ROOT.name, f"{target}-{hashlib.sha256(given.encode()).hexdigest()[:16]}")


def session_of(
    target: str, kind: str, dtype: torch.dtype = torch.float64, **options: Any
) -> sx.Session:
    """A new session of the step that `step_over` makes of these arguments."""
    folder = folder_of(target, repr((kind, dtype, sorted(options.items()))))
    if not folder.exists():
        step = step_over(kind, dtype, **options)
        captured = sx.capture(step, batch_of(8, dtype), staged=True)
        sx.export(captured, folder, target)
    return sx.load(folder, threads=1)


def mean(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of gradients, as a pipeline computes it: in NumPy, on the host."""
    return {name: np.mean([np.asarray(part[name]) for part in parts], axis=0) for name in parts[0]}


def assert_equal_states(one: Mapping[str, Any], other: Mapping[str, Any], rel: float = 0) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        if rel == 0:
            np.testing.assert_array_equal(other[name], value, err_msg=name)
        else:
            np.testing.assert_allclose(other[name], value, rtol=rel, atol=1e-13, err_msg=name)
