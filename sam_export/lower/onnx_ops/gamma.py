"""The logarithm of the gamma function and its derivatives.

For ``x >= 1/2``, with ``y = x + n`` for a fixed ``n`` and the Bernoulli numbers ``B_2k``::

    lgamma(x)  = (y - 1/2) log(y) - y + log(2 pi) / 2 + sum_k B_2k / (2k (2k - 1) y^(2k - 1))
                 - log(x (x + 1) ... (x + n - 1))
    digamma(x) = log(y) - 1 / (2 y) - sum_k B_2k / (2k y^2k) - sum_i 1 / (x + i)

and by reflection for smaller ones. Eight terms at ``y >= 8.5`` are right to 1e-16.

Source: NIST Digital Library of Mathematical Functions, https://dlmf.nist.gov/5.11 (expansions),
    https://dlmf.nist.gov/5.5 (recurrence and reflection)
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sam_export.lower.onnx_ops.table import Function, decomposition

_SHIFT = 8
_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510)


def _wide(function: Function) -> Function:
    """Computes float16 in float32: the factors leave its range."""

    def wide(*arguments: Any) -> Any:
        *others, x = arguments
        if x.dtype != torch.float16:
            return function(*arguments)
        return function(*others, x.float()).half()

    return cast(Function, wide)


def _reflected(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``x < 1/2``, and ``x`` or ``1 - x`` there."""
    small = x < 0.5
    return small, torch.where(small, 1.0 - x, x)


@decomposition("prims::lgamma")
@decomposition("aten::lgamma")
@_wide
def lgamma(x: Tensor) -> Tensor:
    """aten::lgamma(Tensor self) -> Tensor

    Below 1/2: ``log(pi / |sin(pi x)|) - lgamma(1 - x)``.
    """
    small, z = _reflected(x)
    far = z > _SHIFT  # no shift there: the product of the factors would overflow
    y = torch.where(far, z, z + _SHIFT)
    series = (y - 0.5) * y.log() - y + 0.5 * math.log(2.0 * math.pi)
    square, power = y * y, y
    for index, number in enumerate(_BERNOULLI):
        k = index + 1
        series = series + number / (2 * k * (2 * k - 1)) / power
        power = power * square
    near = torch.where(far, 1.0, z)
    product = near
    for shift in range(1, _SHIFT):
        product = product * (near + shift)
    value = torch.where(far, series, series - product.log())
    value = torch.where(torch.isinf(x), torch.full_like(x, math.inf), value)
    # The sine of the distance to the next whole number: pi x itself is not exact for a large x.
    sine = (math.pi * (x - x.round())).sin().abs()
    return torch.where(small, math.log(math.pi) - sine.log() - value, value)


@decomposition("prims::digamma")
@decomposition("aten::digamma")
@_wide
def digamma(x: Tensor) -> Tensor:
    """aten::digamma(Tensor self) -> Tensor

    Below 1/2: ``digamma(1 - x) - pi / tan(pi x)``.
    """
    small, z = _reflected(x)
    y = z + _SHIFT
    value = y.log() - 0.5 / y
    square, power = y * y, y * y
    for index, number in enumerate(_BERNOULLI):
        value = value - number / (2 * (index + 1)) / power
        power = power * square
    for shift in range(_SHIFT):
        value = value - 1.0 / (z + shift)
    turn = math.pi * (x - x.round())
    reflected = value - math.pi * turn.cos() / turn.sin()
    # ATen: minus and plus infinity at the two zeros, no number at the negative whole ones.
    whole = (x == x.round()) & (x < 0)
    result = torch.where(small, reflected, value)
    result = torch.where(whole, torch.full_like(x, math.nan), result)
    return torch.where(x == 0, -(1.0 / x), result)


@decomposition("aten::polygamma")
@_wide
def polygamma(n: int, x: Tensor) -> Tensor:
    """aten::polygamma(int n, Tensor self) -> Tensor

    The n-th derivative of `digamma`::

        (-1)^(n+1) ( n! sum_i 1 / (x + i)^(n+1) + (n-1)! / y^n + n! / (2 y^(n+1))
                     + sum_k B_2k (2k + n - 1)! / ((2k)! y^(2k+n)) )

    Below 1/2: ``(-1)^n polygamma(n, 1 - x) - pi^(n+1) P_n(c)`` with ``c = 1 / tan(pi x)``,
    ``P_0(c) = c`` and ``P_(n+1)(c) = -P_n'(c) (1 + c^2)``: the n-th derivative of ``pi c``.
    """
    if n == 0:
        return digamma(x)
    small, z = _reflected(x)
    y = z + _SHIFT
    value = math.factorial(n - 1) / y**n + math.factorial(n) / 2 / y ** (n + 1)
    square, power = y * y, y ** (n + 2)
    for index, number in enumerate(_BERNOULLI):
        k = index + 1
        factor = number * math.factorial(2 * k + n - 1) / math.factorial(2 * k)
        value = value + factor / power
        power = power * square
    for shift in range(_SHIFT):
        value = value + math.factorial(n) / (z + shift) ** (n + 1)
    value = value if n % 2 else -value
    turn = math.pi * (x - x.round())
    cotangent = turn.cos() / turn.sin()
    polynomial = np.polynomial.Polynomial([0.0, 1.0])
    for _ in range(n):
        polynomial = -polynomial.deriv() * np.polynomial.Polynomial([1.0, 0.0, 1.0])
    derivative = torch.zeros_like(x)
    for coefficient in reversed(polynomial.coef):
        derivative = derivative * cotangent + float(coefficient)
    reflected = (-1) ** n * value - math.pi ** (n + 1) * derivative
    return torch.where(small, reflected, value)
