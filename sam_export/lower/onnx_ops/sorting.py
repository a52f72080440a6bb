"""Sorting."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

from sam_export.lower.onnx_ops.table import ints, lowering, sizes


@lowering("aten::sort.stable")
def sort(
    x: ir.Value, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Any, Any]:
    """aten::sort.stable(Tensor self, *, bool? stable, int dim=-1, bool descending=False)
    -> (Tensor values, Tensor indices)

    ``TopK`` of all elements; of equal ones it puts the lower index first, so it is stable.
    """
    count = op.Gather(op.Shape(x), ints(dim), axis=0)
    values, indices = op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)
    return values, indices


@lowering("aten::topk")
def topk(
    x: ir.Value, k: int | ir.Value, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Any, Any]:
    """aten::topk(Tensor self, SymInt k, int dim=-1, bool largest=True, bool sorted=True) ->
    (Tensor values, Tensor indices)

    ``TopK``; a tensor without dimensions is its own.
    """
    del sorted  # an order is one of the right ones also where none is asked for
    if not sizes(x):
        return op.Identity(x), op.Constant(value_int=0)
    count = ints(k) if isinstance(k, int) else op.Reshape(k, ints(1))
    values, indices = op.TopK(x, count, axis=dim, largest=int(largest), sorted=1)
    return values, indices


@lowering("aten::max.dim")
def max_dim(x: ir.Value, dim: int, keepdim: bool = False) -> tuple[Any, Any]:
    """aten::max.dim(Tensor self, int dim, bool keepdim=False) -> (Tensor values, Tensor indices)

    Of ties the first, as ATen's kernels for the CPU have it.
    """
    return _extreme(x, dim, keepdim, op.ReduceMax, op.ArgMax)


@lowering("aten::min.dim")
def min_dim(x: ir.Value, dim: int, keepdim: bool = False) -> tuple[Any, Any]:
    """aten::min.dim(Tensor self, int dim, bool keepdim=False) -> (Tensor values, Tensor indices)"""
    return _extreme(x, dim, keepdim, op.ReduceMin, op.ArgMin)


def _extreme(x: ir.Value, dim: int, keepdim: bool, reduce: Any, arg: Any) -> tuple[Any, Any]:
    if not sizes(x):
        return op.Identity(x), op.Constant(value_int=0)
    keep = int(keepdim)
    if x.dtype == ir.DataType.BOOL:  # ONNX Runtime has no kernel for it
        number = op.Cast(x, to=ir.DataType.INT32.value)
        value = reduce(number, ints(dim), keepdims=keep)
        return op.Cast(value, to=ir.DataType.BOOL.value), arg(number, axis=dim, keepdims=keep)
    return reduce(x, ints(dim), keepdims=keep), arg(x, axis=dim, keepdims=keep)
