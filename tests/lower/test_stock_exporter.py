"""What the exporter itself gets wrong in a training step: right with our table, wrong without.

A case that starts to fail here is one that torch or onnxscript has repaired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnxruntime as ort
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sam_export.lower.onnx_ops.table import Tables
from tests.lower.onnx_cases import check, randn, with_gradients

CLASSES = torch.tensor([1, 0, 3, 2, 2, 1])
CASES: dict[str, tuple[Callable[..., Any], Sequence[Tensor]]] = {
    "cross_entropy": (lambda x: F.cross_entropy(x, CLASSES), [randn(6, 4)]),
    "special.log_ndtr": (torch.special.log_ndtr, [torch.linspace(-20, 3, 9)]),
    "logaddexp": (torch.logaddexp, [randn(5) * 200, randn(5, seed=1) * 200]),
    "log1p": (lambda x: torch.log1p(x.abs() * 1e-6), [randn(6)]),
    "expm1": (lambda x: torch.expm1(x * 1e-5), [randn(6)]),
    "numbers in float64": (lambda x, y: torch.add(x, y, alpha=1 / 3), [randn(5), randn(5, seed=1)]),
    "norm in float64": (lambda x: torch.linalg.vector_norm(x), [randn(9)]),
    "linspace in float64": (
        lambda x: x + torch.linspace(0, 1 / 3, 7, dtype=torch.float64),
        [randn(7)],
    ),
}
DOUBLE = {name for name in CASES if name.endswith("float64")}


def inputs(name: str) -> list[Tensor]:
    return [value.double() if name in DOUBLE else value for value in CASES[name][1]]


def test_with_our_table() -> None:
    tolerances = {"logaddexp": 200 * torch.finfo(torch.float32).eps * math.sqrt(5)}
    cases = {name: (with_gradients(call), inputs(name)) for name, (call, _) in CASES.items()}
    check(tolerances, **cases)


@pytest.mark.parametrize("name", CASES)
def test_without_it(name: str) -> None:
    if name == "norm in float64" and not ort.__version__.startswith("1.19"):
        pytest.skip("ONNX Runtime 1.32.0 has it right")
    nothing = Tables(forms={}, decomposed=[], own_decompositions={})
    with pytest.raises(AssertionError):
        check(None, nothing, **{name: (with_gradients(CASES[name][0]), inputs(name))})
