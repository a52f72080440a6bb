"""The error function in float64, for which ONNX Runtime's CPU has no kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

from sam_export.lower.onnx_ops.table import lowering, scalar

# Cody's coefficients, highest power first: numerator and denominator in x^2 for |x| <= 0.46875, and
# in |x| above it.
_SMALL = (
    (1.85777706184603153e-1, 3.16112374387056560, 1.13864154151050156e2, 3.77485237685302021e2,
     3.20937758913846947e3),
    (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3,
     2.84423683343917062e3),
)  # fmt: skip
LARGE = (
    (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594, 6.61191906371416295e1,
     2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
     1.23033935479799725e3),
    (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2,
     1.62138957456669019e3, 3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3,
     1.23033935480374942e3),
)  # fmt: skip
_ONE = 6.0
"""From here on ``erf`` is 1 in float64."""


@lowering("aten::erf")
def erf(x: ir.Value) -> Any:
    """aten::erf(Tensor self) -> Tensor

    ``Erf``, where the runtime has a kernel. In float64, with ``y = min(|x|, 6)``::

        erf(x) = x P(x^2) / Q(x^2)                          for y <= 0.46875
        erf(x) = sign(x) (1 - exp(-y^2) R(y) / S(y))        above

    The second fraction is fitted up to 4; beyond it, where ``1 - erf < 2e-8``, what it is off by is
    less than a rounding of the result (the tests measure it).

    Source: W. J. Cody, "Rational Chebyshev Approximations for the Error Function", 1969,
        https://doi.org/10.1090/S0025-5718-1969-0247736-4
    """
    if x.dtype != ir.DataType.DOUBLE:
        return op.Erf(x)
    y = op.Min(op.Abs(x), scalar(_ONE, x))
    square = op.Mul(y, y)
    small = op.Mul(x, _fraction(_SMALL, square, x))
    rest = op.Mul(op.Exp(op.Neg(square)), _fraction(LARGE, y, x))
    large = op.Mul(op.Sign(x), op.Sub(scalar(1.0, x), rest))
    return op.Where(op.LessOrEqual(y, scalar(0.46875, x)), small, large)


def _fraction(coefficients: Sequence[Sequence[float]], t: ir.Value, like: ir.Value) -> Any:
    parts = []
    for part in coefficients:
        value = scalar(part[0], like)
        for coefficient in part[1:]:
            value = op.Add(op.Mul(value, t), scalar(coefficient, like))
        parts.append(value)
    return op.Div(*parts)
