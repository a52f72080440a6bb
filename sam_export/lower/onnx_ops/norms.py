"""Vector norms, at the precision of their tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

from sam_export.lower.onnx_ops.table import ints, lowering, scalar, sizes


@lowering("aten::linalg_vector_norm")
def vector_norm(
    x: ir.Value,
    ord: float = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    dtype: int | None = None,
) -> Any:
    """aten::linalg_vector_norm(Tensor self, Scalar ord=2, int[1]? dim=None, bool keepdim=False, *,
    ScalarType? dtype=None) -> Tensor

    ``(sum |x|^ord)^(1/ord)`` along ``dim``; the largest or smallest ``|x|`` for an infinite order,
    the number of elements that are not zero for order 0. ``ReduceL2`` of a float64 tensor is right
    to float32 only in ONNX Runtime 1.19.2, so there the sum and the root are two operators.
    """
    axes = ints(*dim) if dim and sizes(x) else None
    if dtype not in (None, -1):
        x = op.Cast(x, to=dtype)
        x.dtype = ir.DataType(dtype)
    keep = int(keepdim)
    if ord == 2 and x.dtype != ir.DataType.DOUBLE:
        return op.ReduceL2(x, axes, keepdims=keep)
    if ord == 2:
        return op.Sqrt(op.ReduceSumSquare(x, axes, keepdims=keep))
    size = op.Abs(x)
    if math.isinf(ord):
        reduce = op.ReduceMax if ord > 0 else op.ReduceMin
        return reduce(size, axes, keepdims=keep)
    if ord == 0:
        counted = op.CastLike(op.Not(op.Equal(x, scalar(0.0, x))), x)
        return op.ReduceSum(counted, axes, keepdims=keep)
    if ord == 1:
        return op.ReduceSum(size, axes, keepdims=keep)
    total = op.ReduceSum(op.Pow(size, scalar(float(ord), x)), axes, keepdims=keep)
    return op.Pow(total, scalar(1.0 / ord, x))
