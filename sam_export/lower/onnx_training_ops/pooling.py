"""The gradient of max pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

from sam_export.lower.onnx_ops.pooling import flat_indices
from sam_export.lower.onnx_ops.table import ints
from sam_export.lower.onnx_training_ops.table import portable, training_form, training_op


@training_form("aten::max_pool2d_with_indices_backward")
def max_pool_backward(
    dy: ir.Value,
    x: ir.Value,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: ir.Value,
) -> Any:
    """aten::max_pool2d_with_indices_backward(Tensor grad_output, Tensor self, int[2] kernel_size,
    int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode, Tensor indices) -> Tensor

    ``dx[indices] += dy`` over the flat tensor by ``GatherElementsGrad``, where the portable form
    scatters. ``MaxPoolGrad`` crashes where a shape is not declared, and CUDA does not have it.
    """
    options = (kernel_size, stride, padding, dilation, ceil_mode)
    form = portable("aten::max_pool2d_with_indices_backward")
    flat = flat_indices(dy, x, *options, indices)
    if dy.dtype != ir.DataType.FLOAT or flat is None:
        return form(dy, x, *options, indices)
    size = op.Reshape(op.Size(x), ints(1))
    like = ir.Value(type=ir.TensorType(x.dtype), shape=ir.Shape([None]))
    rows = [op.Reshape(dy, ints(-1)), size, op.Reshape(flat, ints(-1))]
    dx = training_op("GatherElementsGrad", rows, [like], axis=0)[0]
    return op.Reshape(dx, op.Shape(x))
