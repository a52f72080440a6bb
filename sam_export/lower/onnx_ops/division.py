"""Division that rounds; the exporter's own goes through float32, also for large integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op

from sam_export.errors import LoweringError
from sam_export.lower.onnx_ops.arithmetic import Operand, pair
from sam_export.lower.onnx_ops.table import lowering, numpy_dtype, scalar


@lowering("aten::div.Tensor_mode")
@lowering("aten::div.Scalar_mode")
def rounded_division(x: Operand, y: Operand, rounding_mode: str | None = None) -> Any:
    """aten::div.Tensor_mode(Tensor self, Tensor other, *, str? rounding_mode) -> Tensor

    ``floor(x / y)`` or ``trunc(x / y)``. Of integers, ONNX's ``Div`` cuts off towards zero; where
    the signs differ and a rest is left, the floor is one less. Of floats, ``floor`` is ATen's:
    from ``r = fmod(x, y)``, so that a quotient that rounds up to a whole number does not count::

        q = (x - r) / y - (r != 0 and sign(r) != sign(y));  floor(q) + (q - floor(q) > 1/2)
    """
    x, y = pair(x, y)
    assert isinstance(x, ir.Value)
    if rounding_mode not in ("floor", "trunc"):
        raise LoweringError(f"div(rounding_mode={rounding_mode!r}) has no ONNX form.")
    if np.issubdtype(numpy_dtype(x), np.integer):
        return op.Div(x, y) if rounding_mode == "trunc" else _floor_of_integers(x, y)
    if rounding_mode == "trunc":
        quotient = op.Div(x, y)
        return op.Mul(op.Sign(quotient), op.Floor(op.Abs(quotient)))
    return _floor_of_floats(x, y)


def _floor_of_integers(x: ir.Value, y: Any) -> Any:
    zero = scalar(0, x)
    quotient = op.Div(x, y)
    has_rest = op.Not(op.Equal(op.Mul(quotient, y), x))
    differ = op.Xor(op.Less(x, zero), op.Less(y, zero))
    return op.Sub(quotient, op.CastLike(op.And(has_rest, differ), x))


def _floor_of_floats(x: ir.Value, y: Any) -> Any:
    zero = scalar(0.0, x)
    rest = op.Mod(x, y, fmod=1)
    differ = op.Xor(op.Less(rest, zero), op.Less(y, zero))
    less = op.And(op.Not(op.Equal(rest, zero)), differ)
    quotient = op.Sub(op.Div(op.Sub(x, rest), y), op.CastLike(less, x))
    floor = op.Floor(quotient)
    up = op.Greater(op.Sub(quotient, floor), scalar(0.5, x))
    return op.Where(op.Equal(y, zero), op.Div(x, y), op.Add(floor, op.CastLike(up, x)))
