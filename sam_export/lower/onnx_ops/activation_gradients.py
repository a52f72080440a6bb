"""Gradients of activations, where the exporter has none."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch import Tensor

from sam_export.lower.onnx_ops.table import decomposition, lowering, scalar

# ATen calls silu_backward and mish_backward composite, so that no decomposition of them is ever
# used; they get their ONNX form at once.


@lowering("aten::silu_backward")
def silu_backward(dy: ir.Value, x: ir.Value) -> Any:
    """aten::silu_backward(Tensor grad_output, Tensor self) -> Tensor

    ``dy * s * (1 + x * (1 - s))`` with ``s = sigmoid(x)``.
    """
    one = scalar(1.0, x)
    s = op.Sigmoid(x)
    return op.Mul(dy, op.Mul(s, op.Add(one, op.Mul(x, op.Sub(one, s)))))


@lowering("aten::mish_backward")
def mish_backward(dy: ir.Value, x: ir.Value) -> Any:
    """aten::mish_backward(Tensor grad_output, Tensor self) -> Tensor

    ``dy * (t + x * sigmoid(x) * (1 - t^2))`` with ``t = tanh(softplus(x))``.
    """
    one = scalar(1.0, x)
    t = op.Tanh(op.Softplus(x))
    slope = op.Mul(op.Mul(x, op.Sigmoid(x)), op.Sub(one, op.Mul(t, t)))
    return op.Mul(dy, op.Add(t, slope))


@decomposition("aten::hardshrink_backward")
@decomposition("aten::softshrink_backward")
def shrink_backward(dy: Tensor, x: Tensor, lambd: float) -> Tensor:
    """aten::hardshrink_backward(Tensor grad_out, Tensor self, Scalar lambd) -> Tensor

    ``dy`` where ``|x| > lambd``, else 0. That of softshrink is the same.
    """
    return torch.where((x >= -lambd) & (x <= lambd), 0.0, dy)
