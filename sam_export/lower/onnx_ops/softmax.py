"""The softmax of attention, in which masked scores are -inf."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op

from sam_export.lower.onnx_ops.table import ints, lowering, numpy_dtype, scalar

_FAR_BELOW = {np.dtype(np.float32): 80.0, np.dtype(np.float64): 700.0}
"""Below the largest score by this much, ``exp`` is nearly the least number that is not subnormal.

It is 2e-35 and 1e-304: beside the 1 of the largest score it is nothing.
"""


@lowering("aten::_safe_softmax")
def safe_softmax(x: ir.Value, dim: int, dtype: int | None = None) -> Any:
    """aten::_safe_softmax(Tensor self, int dim, *, ScalarType? dtype=None) -> Tensor

    ``exp(x) / sum(exp(x))``, and 0 for a row that is -inf throughout.

    ONNX Runtime's ``Softmax`` and ``Exp`` pass through subnormal numbers where ``x`` is -inf, which
    takes ten times as long (12x4x64x64 scores, causal: 0.56 against 0.07 ms). So scores are raised
    to 80 below the largest of their row, and what was -inf is made 0 afterwards.
    """
    if dtype not in (None, -1):
        shape, x = x.shape, op.Cast(x, to=dtype)
        x.dtype, x.shape = ir.DataType(dtype), shape
    kind = numpy_dtype(x)
    lowest = scalar(float(np.finfo(kind).min), x)
    if kind in _FAR_BELOW:
        largest = op.Max(op.ReduceMax(x, ints(dim), keepdims=1), lowest)
        lowest = op.Sub(largest, scalar(_FAR_BELOW[kind], x))
    raised = op.Max(x, lowest)
    seen = op.CastLike(op.Greater(x, scalar(-np.inf, x)), x)
    return op.Mul(op.Softmax(raised, axis=dim), seen)
