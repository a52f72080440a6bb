"""Arithmetic with Python numbers, at the tensor's own precision.

The exporter writes a Python number as a float32 constant and casts it, so that in a float64 graph
a weight decay of 0.01 becomes 0.00999999977648258: an error of 2e-8 in every update. These forms
round a number once, to the dtype of the tensor it meets. Tensors have been promoted to one dtype
before (an exporter pass); where one is still another, a scalar tensor gives way to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18 as op

from sam_export.lower.onnx_ops.table import ints, lowering, numpy_dtype, scalar, sizes

Operand: TypeAlias = ir.Value | int | float


def pair(x: Operand, y: Operand) -> tuple[Any, Any]:
    """Both operands as values of one dtype."""
    if not isinstance(y, ir.Value):
        assert isinstance(x, ir.Value)
        return x, scalar(y, x)
    if not isinstance(x, ir.Value):
        return scalar(x, y), y
    if x.dtype == y.dtype:
        return x, y
    return (op.CastLike(x, y), y) if _weight(x) < _weight(y) else (x, op.CastLike(y, x))


def _weight(value: ir.Value) -> tuple[bool, bool, int]:
    dtype = numpy_dtype(value)
    assert value.shape is not None
    return bool(np.issubdtype(dtype, np.floating)), len(value.shape) > 0, dtype.itemsize


def _is_bool(*operands: Operand) -> bool:
    return all(isinstance(v, ir.Value) and v.dtype == ir.DataType.BOOL for v in operands)


def _times(y: Operand, alpha: float) -> Operand:
    """``alpha * y``, in the dtype of ``y``."""
    if alpha == 1:
        return y
    if not isinstance(y, ir.Value):
        return y * alpha
    product: ir.Value = op.Mul(y, scalar(alpha, y))
    product.dtype, product.shape = y.dtype, y.shape
    return product


@lowering("aten::add.Tensor")
@lowering("aten::add.Scalar")
def add(x: Operand, y: Operand, alpha: float = 1) -> Any:
    """aten::add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor

    ``x + alpha * y``; of two bool tensors it is their "or".
    """
    if _is_bool(x, y):
        return op.Or(x, y)
    return op.Add(*pair(x, _times(y, alpha)))


@lowering("aten::sub.Tensor")
@lowering("aten::sub.Scalar")
def sub(x: Operand, y: Operand, alpha: float = 1) -> Any:
    """aten::sub.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor

    ``x - alpha * y``.
    """
    return op.Sub(*pair(x, _times(y, alpha)))


@lowering("aten::rsub.Tensor")
@lowering("aten::rsub.Scalar")
def rsub(x: Operand, y: Operand, alpha: float = 1) -> Any:
    """aten::rsub.Scalar(Tensor self, Scalar other, Scalar alpha=1) -> Tensor

    ``y - alpha * x``.
    """
    first, second = pair(_times(x, alpha), y)
    return op.Sub(second, first)


@lowering("aten::mul.Tensor")
@lowering("aten::mul.Scalar")
def mul(x: Operand, y: Operand) -> Any:
    """aten::mul.Tensor(Tensor self, Tensor other) -> Tensor

    ``x * y``; of two bool tensors it is their "and".
    """
    return op.And(x, y) if _is_bool(x, y) else op.Mul(*pair(x, y))


@lowering("aten::div.Tensor")
@lowering("aten::div.Scalar")
def div(x: Operand, y: Operand) -> Any:
    """aten::div.Tensor(Tensor self, Tensor other) -> Tensor

    ``x / y``, of integers too as floats: the exporter has promoted them.
    """
    return op.Div(*pair(x, y))


@lowering("aten::pow.Tensor_Scalar")
@lowering("aten::pow.Scalar")
@lowering("aten::pow.Tensor_Tensor")
def power(x: Operand, y: Operand) -> Any:
    """aten::pow.Tensor_Scalar(Tensor self, Scalar exponent) -> Tensor

    ``x ** y``.
    """
    return op.Pow(*pair(x, y))


@lowering("aten::lerp.Scalar")
def lerp(start: ir.Value, end: ir.Value, weight: float) -> Any:
    """aten::lerp.Scalar(Tensor self, Tensor end, Scalar weight) -> Tensor

    ``start + weight * (end - start)`` for a weight below 1/2, else
    ``end - (1 - weight) * (end - start)``, as ATen has it.
    """
    difference = op.Sub(end, start)
    if abs(weight) < 0.5:
        return op.Add(start, op.Mul(difference, scalar(weight, start)))
    return op.Sub(end, op.Mul(difference, scalar(1.0 - weight, start)))


def _compare(name: str) -> Any:
    def form(x: Operand, y: Operand) -> Any:
        return getattr(op, name)(*pair(x, y))

    return form


for _aten, _onnx in (
    ("eq", "Equal"),
    ("lt", "Less"),
    ("le", "LessOrEqual"),
    ("gt", "Greater"),
    ("ge", "GreaterOrEqual"),
):
    # aten::lt.Scalar(Tensor self, Scalar other) -> Tensor, and kin: x < y.
    lowering(f"aten::{_aten}.Scalar")(_compare(_onnx))


@lowering("aten::ne.Scalar")
def not_equal(x: ir.Value, y: float) -> Any:
    """aten::ne.Scalar(Tensor self, Scalar other) -> Tensor

    ``x != y``; true where ``x`` is NaN.
    """
    return op.Not(op.Equal(*pair(x, y)))


@lowering("aten::full_like")
def full_like(x: ir.Value, value: float, dtype: Any = None, **_: Any) -> Any:
    """aten::full_like(Tensor self, Scalar fill_value, *, ScalarType? dtype=None, ...) -> Tensor"""
    return op.Expand(_constant(value, dtype, x), op.Shape(x))


@lowering("aten::full")
def full(size: Sequence[Any], value: float, dtype: Any = None, **_: Any) -> Any:
    """aten::full(SymInt[] size, Scalar fill_value, *, ScalarType? dtype=None, ...) -> Tensor"""
    constant = _constant(value, dtype, None)
    if len(size) == 0:
        return constant
    if all(isinstance(extent, int) for extent in size):
        shape = op.Constant(value_ints=list(size))
    else:
        one = op.Constant(value_ints=[1])
        parts = [
            op.Constant(value_ints=[extent]) if isinstance(extent, int) else op.Reshape(extent, one)
            for extent in size
        ]
        shape = op.Concat(*parts, axis=0)
    return op.Expand(constant, shape)


@lowering("aten::linspace")
def linspace(start: float, end: float, steps: int, dtype: Any = None, **_: Any) -> Any:
    """aten::linspace(Scalar start, Scalar end, int steps, *, ScalarType? dtype=None, ...) -> Tensor

    The operator's own values; the exporter computes them in float32.
    """
    kind = torch.float32 if dtype in (None, -1) else getattr(torch, _torch_name(dtype))
    return op.Constant(value=ir.tensor(torch.linspace(start, end, steps, dtype=kind).numpy()))


def _torch_name(dtype: int) -> str:
    return str(np.dtype(ir.DataType(dtype).numpy()))


@lowering("aten::scalar_tensor")
@lowering("prims::scalar_tensor")
def scalar_tensor(value: float, dtype: Any = None, **_: Any) -> Any:
    """aten::scalar_tensor(Scalar s, *, ScalarType? dtype=None, ...) -> Tensor"""
    return _constant(value, dtype, None)


def _constant(value: Any, dtype: int | None, like: ir.Value | None) -> Any:
    """``value`` as a scalar; the exporter hands dtypes on as ONNX's numbers, and none as -1."""
    given = dtype not in (None, -1)
    if isinstance(value, ir.Value):
        return op.Cast(value, to=dtype) if given else value
    if given:
        kind = ir.DataType(dtype).numpy()
    elif like is not None:
        kind = numpy_dtype(like)
    else:  # torch's own defaults
        kind = np.dtype({bool: np.bool_, int: np.int64, float: np.float32}[type(value)])
    return op.Constant(value=ir.tensor(np.array(value, kind)))


def _reduced(reduce: Any) -> Any:
    def form(x: ir.Value, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
        rank = len(sizes(x))
        axes = ints(*dim) if dim and rank else None
        return reduce(x, axes, keepdims=int(keepdim)) if rank else op.Identity(x)

    return form


# aten::amax(Tensor self, int[1] dim=[], bool keepdim=False) -> Tensor: over all where dim is empty.
lowering("aten::amax")(_reduced(op.ReduceMax))
# aten::amin(Tensor self, int[1] dim=[], bool keepdim=False) -> Tensor
lowering("aten::amin")(_reduced(op.ReduceMin))


@lowering("aten::prod.dim_int")
def prod_dim(x: ir.Value, dim: int, keepdim: bool = False, *, dtype: int | None = None) -> Any:
    """aten::prod.dim_int(Tensor self, int dim, bool keepdim=False, *, ScalarType? dtype=None) ->
    Tensor
    """
    return _product(x, [dim], keepdim, dtype)


@lowering("prims::prod")
def prod(x: ir.Value, dims: Sequence[int] | None, *, output_dtype: int | None = None) -> Any:
    """prims::prod(Tensor inp, int[]? dims, *, ScalarType? output_dtype=None) -> Tensor"""
    return _product(x, dims, False, output_dtype)


def _product(x: ir.Value, dims: Sequence[int] | None, keepdim: bool, dtype: int | None) -> Any:
    rank = len(sizes(x))
    axes = list(range(rank)) if dims is None else [dim % rank for dim in dims if rank]
    keep = int(keepdim)
    if dtype in (None, -1) and not np.issubdtype(numpy_dtype(x), np.floating):
        dtype = ir.DataType.INT64.value
    if dtype not in (None, -1):
        x = op.Cast(x, to=dtype)
    return op.ReduceProd(x, ints(*axes), keepdims=keep) if axes else op.Identity(x)


@lowering("aten::where.self")
def where(condition: ir.Value, x: ir.Value, y: ir.Value) -> Any:
    """aten::where.self(Tensor condition, Tensor self, Tensor other) -> Tensor

    ``x`` where the condition holds, else ``y``. ONNX Runtime has no ``Where`` for bool: there it is
    ``(condition and x) or (not condition and y)``.
    """
    if x.dtype != ir.DataType.BOOL:
        return op.Where(condition, x, y)
    return op.Or(op.And(condition, x), op.And(op.Not(condition), y))
