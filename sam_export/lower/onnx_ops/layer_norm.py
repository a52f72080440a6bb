"""Layer normalization in float64, which ONNX's own operator computes in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

from sam_export.lower.onnx_ops.table import ints, lowering, scalar


@lowering("aten::native_layer_norm")
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
