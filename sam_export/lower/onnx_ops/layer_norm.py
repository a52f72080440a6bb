"""Layer normalization and its gradient; group normalization."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

from sam_export.lower.onnx_ops.half import in_float32
from sam_export.lower.onnx_ops.table import full, ints, lowering, scalar, sizes, static


@lowering("aten::native_layer_norm")
@in_float32()
def native_layer_norm(
    x: ir.Value,
    normalized_shape: Sequence[Any],
    w: ir.Value | None,
    b: ir.Value | None,
    eps: float,
) -> tuple[Any, Any, Any]:
    """aten::native_layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor?
    bias, float eps) -> (Tensor, Tensor, Tensor)

    Over the last axes, as many as ``normalized_shape`` has::

        mean = sum(x) / n;  rstd = 1 / sqrt(sum((x - mean)^2) / n + eps)
        y    = (x - mean) * rstd * w + b

    ``LayerNormalization`` gives all three, but its statistics are float32 whatever ``x`` is (its
    ``stash_type``); so a float64 ``x`` gets the formula itself.
    """
    count = len(normalized_shape)
    if x.dtype != ir.DataType.DOUBLE and w is not None:
        y, mean, rstd = op.LayerNormalization(x, w, b, axis=-count, epsilon=eps)
        return y, mean, rstd
    axes = ints(*range(-count, 0))
    mean = op.ReduceMean(x, axes, keepdims=1)
    centred = op.Sub(x, mean)
    variance = op.ReduceMean(op.Mul(centred, centred), axes, keepdims=1)
    rstd = op.Reciprocal(op.Sqrt(op.Add(variance, scalar(eps, x))))
    y = op.Mul(centred, rstd)
    y = y if w is None else op.Mul(y, w)
    return y if b is None else op.Add(y, b), mean, rstd


@lowering("aten::native_layer_norm_backward")
@in_float32()
def native_layer_norm_backward(
    dy: ir.Value,
    x: ir.Value,
    normalized_shape: Sequence[Any],
    mean: ir.Value,
    rstd: ir.Value,
    w: ir.Value | None,
    b: ir.Value | None,
    output_mask: Sequence[bool],
) -> tuple[Any, Any, Any]:
    """aten::native_layer_norm_backward(Tensor grad_out, Tensor input, SymInt[] normalized_shape,
    Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, bool[3] output_mask) -> (Tensor, Tensor,
    Tensor)

    With ``xc = x - mean`` of a row of ``n`` elements, ``p = dy * xc``, and sums over the row for
    ``dx``, over all rows for ``dw`` and ``db``::

        dx = dy * w * rstd - sum(dy * w) * (rstd / n) - xc * sum(p * w) * (rstd^3 / n)
        dw = sum(rstd * p);  db = sum(dy)

    The sums with ``w`` and ``rstd`` are products of a matrix and a vector, which read ``dy`` and
    ``p`` and write nothing of their size: seven operators do, where torch's decomposition has ten.
    """
    del b
    shape = static("What a LayerNorm goes over", sizes(x)[-len(normalized_shape) :])
    n = prod(shape)
    rows = ints(-1, n)
    whole, narrow = op.Shape(x), ints(-1, 1)
    column = full(n, 1.0, x) if w is None else w
    column = op.Reshape(column, narrow)
    dy, mean, rstd = op.Reshape(dy, rows), op.Reshape(mean, narrow), op.Reshape(rstd, narrow)
    centred = op.Sub(op.Reshape(x, rows), mean)
    p = op.Mul(dy, centred)
    dx = dw = db = scalar(0.0, x)
    if output_mask[0]:
        # No factor of a product is a constant number: onnxruntime 1.31.1 takes such a one into the
        # product as a float32 number, also in float64.
        share = op.Div(rstd, scalar(float(n), x))
        slope = op.Mul(op.MatMul(p, column), op.Mul(share, op.Mul(rstd, rstd)))
        weighted = dy if w is None else op.Mul(dy, op.Reshape(w, ints(n)))
        shifted = op.Sub(op.Mul(weighted, rstd), op.Mul(op.MatMul(dy, column), share))
        dx = op.Sub(shifted, op.Mul(centred, slope))
        dx = op.Reshape(dx, whole)
    if output_mask[1]:
        dw = op.Reshape(op.MatMul(op.Reshape(rstd, ints(1, -1)), p), ints(*shape))
    if output_mask[2]:
        db = op.Reshape(op.ReduceSum(dy, ints(0), keepdims=0), ints(*shape))
    return dx, dw, db


@lowering("aten::native_group_norm")
@in_float32()
def native_group_norm(
    x: ir.Value,
    w: ir.Value | None,
    b: ir.Value | None,
    n: Any,
    c: Any,
    pixels: Any,
    group: int,
    eps: float,
) -> tuple[Any, Any, Any]:
    """aten::native_group_norm(Tensor input, Tensor? weight, Tensor? bias, SymInt N, SymInt C,
    SymInt HxW, int group, float eps) -> (Tensor, Tensor, Tensor)

    Over the channels of a group and all places of an image, ``m`` elements, with ``w`` and ``b`` of
    each channel::

        mean = sum(x) / m;  rstd = 1 / sqrt(sum((x - mean)^2) / m + eps)
        y    = (x - mean) * rstd * w + b

    The exporter's translation takes ``InstanceNormalization`` for ``y``, which ONNX Runtime has in
    float32 only, and computes the statistics beside it once more.
    """
    del n, c, pixels
    dims = sizes(x)
    [channels] = static("The channels of a group norm", dims[1:2])
    flat = op.Reshape(x, op.Concat(op.Shape(x, start=0, end=1), ints(group, -1), axis=0))
    mean = op.ReduceMean(flat, ints(2), keepdims=1)
    centred = op.Sub(flat, mean)
    variance = op.ReduceMean(op.Mul(centred, centred), ints(2), keepdims=1)
    rstd = op.Reciprocal(op.Sqrt(op.Add(variance, scalar(eps, x))))
    y = op.Reshape(op.Mul(centred, rstd), op.Shape(x))
    per_channel = ints(channels, *[1] * (len(dims) - 2))
    y = y if w is None else op.Mul(y, op.Reshape(w, per_channel))
    y = y if b is None else op.Add(y, op.Reshape(b, per_channel))
    return y, op.Squeeze(mean, ints(2)), op.Squeeze(rstd, ints(2))
