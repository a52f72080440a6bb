"""Writing at indices."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op

from sam_export.errors import LoweringError
from sam_export.lower.onnx_ops.arithmetic import Operand
from sam_export.lower.onnx_ops.table import ints, lowering, numpy_dtype, scalar, sizes

_REDUCTIONS = {"add": "add", "sum": "add", "multiply": "mul", "prod": "mul", "amax": "max",
               "amin": "min"}  # fmt: skip


def _scattered(x: ir.Value, dim: int, index: ir.Value, src: Operand, reduction: str) -> Any:
    """``x`` with ``src`` at ``index`` along ``dim``, one by one or reduced with what is there.

    ``ScatterElements`` wants updates of the index's shape, where torch lets ``src`` be larger; and
    ONNX Runtime refuses it a tensor without dimensions.
    """
    if not isinstance(src, ir.Value):
        updates = op.Expand(scalar(src, x), op.Shape(index))
    elif sizes(src) == sizes(index) and None not in sizes(src):
        updates = src
    else:
        rank = len(sizes(index))
        updates = op.Slice(src, ints(*[0] * rank), op.Shape(index), ints(*range(rank)))
    if not sizes(x):
        one = ints(1)
        x, index, updates = (op.Reshape(value, one) for value in (x, index, updates))
        result = op.ScatterElements(x, index, updates, axis=0, reduction=reduction)
        return op.Squeeze(result, ints(0))
    return op.ScatterElements(x, index, updates, axis=dim, reduction=reduction)


@lowering("aten::scatter.src")
@lowering("aten::scatter.value")
def scatter(x: ir.Value, dim: int, index: ir.Value, src: Operand) -> Any:
    """aten::scatter.src(Tensor self, int dim, Tensor index, Tensor src) -> Tensor

    ``x[index[i]] = src[i]`` along ``dim``.
    """
    return _scattered(x, dim, index, src, "none")


@lowering("aten::scatter_add")
def scatter_add(x: ir.Value, dim: int, index: ir.Value, src: ir.Value) -> Any:
    """aten::scatter_add(Tensor self, int dim, Tensor index, Tensor src) -> Tensor

    ``x[index[i]] += src[i]`` along ``dim``.
    """
    return _scattered(x, dim, index, src, "add")


@lowering("aten::scatter.reduce")
@lowering("aten::scatter.value_reduce")
def scatter_reduce(x: ir.Value, dim: int, index: ir.Value, src: Operand, reduce: str) -> Any:
    """aten::scatter.reduce(Tensor self, int dim, Tensor index, Tensor src, *, str reduce) -> Tensor

    As `scatter`, with ``add`` or ``multiply``.
    """
    return _scattered(x, dim, index, src, _REDUCTIONS[reduce])


@lowering("aten::scatter_reduce.two")
def scatter_reduce_two(
    x: ir.Value, dim: int, index: ir.Value, src: ir.Value, reduce: str, include_self: bool = True
) -> Any:
    """aten::scatter_reduce.two(Tensor self, int dim, Tensor index, Tensor src, str reduce, *,
    bool include_self=True) -> Tensor

    Without ``include_self``, the places that are written to start at the reduction's neutral value;
    a mean divides by the number of values that it is of, rounded down for integers.
    """
    if reduce not in (*_REDUCTIONS, "mean"):
        raise LoweringError(f"scatter_reduce(reduce={reduce!r}) has no ONNX form.")
    start = x
    if not include_self:
        start = _scattered(x, dim, index, _neutral(reduce, x), "none")
        start.dtype, start.shape = x.dtype, x.shape
    if reduce != "mean":
        return _scattered(start, dim, index, src, _REDUCTIONS[reduce])
    total = _scattered(start, dim, index, src, "add")
    ones = op.Expand(scalar(1, x), op.Shape(x))
    ones.dtype, ones.shape = x.dtype, x.shape
    count = _scattered(ones, dim, index, 0, "none") if not include_self else ones
    count.dtype, count.shape = x.dtype, x.shape
    count = _scattered(count, dim, index, 1, "add")
    if x.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16):
        raise LoweringError("scatter_reduce(reduce='mean') of integers has no ONNX form.")
    return op.Div(total, op.Max(count, scalar(1, x)))


def _neutral(reduce: str, x: ir.Value) -> float:
    if reduce in ("prod", "multiply"):
        return 1.0
    if reduce not in ("amax", "amin"):
        return 0.0
    kind = numpy_dtype(x)
    if np.issubdtype(kind, np.floating):
        return float("-inf") if reduce == "amax" else float("inf")
    bounds = np.iinfo(kind)
    return int(bounds.min if reduce == "amax" else bounds.max)
