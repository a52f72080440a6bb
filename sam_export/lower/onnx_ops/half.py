"""Forms that compute in float32 where their input is float16, as ATen's kernels do.

And the rounding to float16 that ONNX Runtime's CPU does not leave out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

from sam_export.lower import float16_rounding  # noqa: F401  the operator
from sam_export.lower.onnx_ops.table import lowering

_HALF, _FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


@lowering("sam_export::rounded_to_float16")
def rounded_to_float16(x: ir.Value) -> Any:
    """rounded_to_float16(Tensor x) -> Tensor

    A cast to float16 and back. ONNX Runtime leaves out a pair of casts, also one that rounds; the
    largest of one number, which is that number (and NaN of NaN), is an operator between them that
    its CPU has for float16.
    """
    return op.Cast(op.Max(op.Cast(x, to=_HALF.value)), to=_FLOAT.value)


def in_float32(keeps: Sequence[int] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a form that gets a float16 value compute in float32.

    Args:
        keeps: Places of the results that stay float32, as the operator's meta kernel has them.
    """

    def decorated(form: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(form)
        def wide(*arguments: Any, **named: Any) -> Any:
            if not any(_is_half(value) for value in (*arguments, *named.values())):
                return form(*arguments, **named)
            named = {key: _widened(value) for key, value in named.items()}
            results = form(*map(_widened, arguments), **named)
            return tuple(
                value if place in keeps else op.Cast(value, to=_HALF.value)
                for place, value in enumerate(results)
            )

        return wide

    return decorated


def _is_half(value: Any) -> bool:
    return isinstance(value, ir.Value) and value.dtype == _HALF


def _widened(value: Any) -> Any:
    if not _is_half(value):
        return value
    wide = op.Cast(value, to=_FLOAT.value)
    wide.dtype, wide.shape = _FLOAT, value.shape
    return wide
