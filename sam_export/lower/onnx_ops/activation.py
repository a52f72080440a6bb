"""Gradients of activations."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

from sam_export.lower.onnx_ops.table import lowering, scalar


@lowering("aten::threshold_backward")
def threshold_backward(dy: ir.Value, x: ir.Value, threshold: float) -> Any:
    """aten::threshold_backward(Tensor grad_output, Tensor self, Scalar threshold) -> Tensor

    ``dy`` where ``x > threshold``, else 0, as a product with the mask: ``Where`` with a scalar
    branch takes ONNX Runtime's CPU five times as long (9.3 against 1.8 ms on 2 M floats). They
    differ where ``dy`` is not finite under a zero mask (NaN instead of 0); such a step is not
    finite anyway.
    """
    return op.Mul(dy, op.CastLike(op.Greater(x, scalar(float(threshold), x)), dy))
