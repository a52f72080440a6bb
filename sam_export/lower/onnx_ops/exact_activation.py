"""Activations at the tensor's own precision.

ONNX keeps the numbers of ``HardSigmoid``, ``LeakyRelu``, ``Elu`` and ``Selu`` as float32 attributes
and the exporter writes those of ``Clip`` and ``Softplus`` as float32 constants: in a float64 graph
they are 1e-8 to 3e-7 off. These forms round each number once, to the dtype of the tensor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch import Tensor

from sam_export.lower.onnx_ops.table import DECOMPOSED, decomposition, lowering, scalar

# By torch's decompositions, which are products and sums with Python numbers.
DECOMPOSED += [
    torch.ops.aten.hardsigmoid.default,
    torch.ops.aten.hardswish.default,
    torch.ops.aten.hardswish_backward.default,
    torch.ops.aten.hardtanh.default,
    torch.ops.aten.hardtanh_backward.default,
    torch.ops.aten.leaky_relu.default,
    torch.ops.aten.elu.default,
    torch.ops.aten.selu.default,
    torch.ops.aten.celu.default,
    torch.ops.aten.softplus.default,
]

_SIXTH = float(np.float32(1 / 6))


@decomposition("aten::hardsigmoid_backward")
def hardsigmoid_backward(grad: Tensor, x: Tensor) -> Tensor:
    """aten::hardsigmoid_backward(Tensor grad_output, Tensor self) -> Tensor

    ``grad / 6`` where ``-3 < x < 3``, else zero. ATen's ``1 / 6`` is a float32 in every dtype.
    """
    return torch.where((x > -3) & (x < 3), grad * _SIXTH, torch.zeros_like(grad))


@lowering("aten::clamp")
def clamp(x: ir.Value, low: float | None = None, high: float | None = None) -> Any:
    """aten::clamp(Tensor self, Scalar? min=None, Scalar? max=None) -> Tensor

    ``min(max(x, low), high)``; a NaN stays one.
    """
    y = x if low is None else op.Max(x, scalar(low, x))
    return y if high is None else op.Min(y, scalar(high, x))


@lowering("aten::clamp_min")
def clamp_min(x: ir.Value, low: float) -> Any:
    """aten::clamp_min(Tensor self, Scalar min) -> Tensor"""
    return op.Max(x, scalar(low, x))


@lowering("aten::clamp_max")
def clamp_max(x: ir.Value, high: float) -> Any:
    """aten::clamp_max(Tensor self, Scalar max) -> Tensor"""
    return op.Min(x, scalar(high, x))
