"""``erfcx(x) = exp(x^2) (1 - erf(x))`` and the logarithm of the normal distribution.

The exporter writes the products and logarithms as they stand: ``exp`` overflows where ``1 - erf``
is zero, and the logarithm of zero is minus infinity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sam_export.lower.onnx_ops.error_function import LARGE
from sam_export.lower.onnx_ops.table import decomposition

# Cody's coefficients above 4, highest power first, in 1 / y^2.
_HUGE = (
    (1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1,
     1.60837851487422766e-2, 6.58749161529837803e-4),
    (1.0, 2.56852019228982242, 1.87295284992346047, 5.27905102951428412e-1,
     6.05183413124413191e-2, 2.33520497626869185e-3),
)  # fmt: skip


def _fraction(coefficients: Sequence[Sequence[float]], t: Tensor) -> Tensor:
    above, below = (_polynomial(part, t) for part in coefficients)
    return above / below


def _polynomial(coefficients: Sequence[float], t: Tensor) -> Tensor:
    value = torch.full_like(t, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * t + coefficient
    return value


@decomposition("aten::special_erfcx")
@decomposition("prims::erfcx")
def erfcx(x: Tensor) -> Tensor:
    """aten::special_erfcx(Tensor self) -> Tensor

    With ``y = |x|`` and ``t = 1 / y^2``::

        exp(x^2) (1 - erf(x))                    for y <= 0.46875
        R(y) / S(y)                              up to 4
        (1 / sqrt(pi) - t P(t) / Q(t)) / y       above
        2 exp(x^2) - erfcx(y)                    for x < -0.46875

    Source: W. J. Cody, "Rational Chebyshev Approximations for the Error Function", 1969,
        https://doi.org/10.1090/S0025-5718-1969-0247736-4
    """
    y = x.abs()
    near = x.clamp(-0.46875, 0.46875)
    small = torch.exp(near * near) * (1.0 - torch.erf(near))
    middle = _fraction(LARGE, y.clamp(0.46875, 4.0))
    far = y.clamp_min(4.0)
    t = 1.0 / (far * far)
    large = (1.0 / math.sqrt(math.pi) - t * _fraction(_HUGE, t)) / far
    outside = torch.where(y <= 4.0, middle, large)
    outside = torch.where(x < 0, 2.0 * torch.exp(x * x) - outside, outside)
    return torch.where(y <= 0.46875, small, outside)


@decomposition("aten::erfc")
def erfc(x: Tensor) -> Tensor:
    """aten::erfc(Tensor self) -> Tensor

    ``1 - erf(x)``; above 1/2 ``exp(-x^2) erfcx(x)``, which keeps its digits.
    """
    far = x.clamp_min(0.5)
    return torch.where(x < 0.5, 1.0 - torch.erf(x), torch.exp(-far * far) * erfcx(far))


@decomposition("aten::special_log_ndtr")
def log_ndtr(x: Tensor) -> Tensor:
    """aten::special_log_ndtr(Tensor self) -> Tensor

    ``log(erfcx(-x / sqrt(2)) / 2) - x^2 / 2`` below -1, else ``log1p(-erfc(x / sqrt(2)) / 2)``.
    """
    scaled = x * math.sqrt(0.5)
    low = torch.log(erfcx((-scaled).clamp_min(0.5)) / 2) - scaled * scaled
    high = torch.log1p(-erfc(scaled.clamp_min(-1.0)) / 2)
    return torch.where(x < -1.0, low, high)
