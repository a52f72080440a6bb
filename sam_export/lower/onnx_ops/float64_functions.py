"""Functions that ONNX Runtime's CPU has no float64 kernel for, or the exporter writes inexactly.

In float64: cos, tan, their inverses, the hyperbolic ones, products along a dimension. In every
dtype ``log1p`` and ``expm1``, which the exporter writes as ``log(1 + x)`` and ``exp(x) - 1``: all
digits of a small ``x`` are lost in the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sam_export.lower.onnx_ops.table import Function, decomposition

IN_EVERY_DTYPE: dict[str, Callable[..., Any]] = {}
"""ATen operator to its form in simpler operators, for dtypes other than float64 too."""


def _in_float64(schema: str) -> Callable[[Function], Function]:
    """Registers a decomposition for float64 only; the function itself takes every dtype."""

    def register(function: Function) -> Function:
        def only(x: Tensor, *arguments: Any, **named: Any) -> Any:
            return function(x, *arguments, **named) if x.dtype == torch.float64 else NotImplemented

        decomposition(schema)(only)
        IN_EVERY_DTYPE[schema] = function
        return function

    return register


@decomposition("aten::log1p")
def log1p(x: Tensor) -> Any:
    """aten::log1p(Tensor self) -> Tensor

    With ``u = 1 + x``, rounded: ``log(u) x / (u - 1)``; ``x`` where ``u`` is 1.

    Source: W. Kahan, in the HP-15C Advanced Functions Handbook, 1982, appendix
    """
    if not x.is_floating_point():
        return NotImplemented
    u = 1.0 + x
    tiny = u == 1.0
    exact = torch.log(u) * (x / torch.where(tiny, 1.0, u - 1.0))
    return torch.where(tiny, x, torch.where(torch.isinf(x), x, exact))


@decomposition("aten::expm1")
def expm1(x: Tensor) -> Any:
    """aten::expm1(Tensor self) -> Tensor

    ``2 tanh(x/2) / (1 - tanh(x/2))`` where ``|x| < 1``, else ``exp(x) - 1``.
    """
    if not x.is_floating_point():
        return NotImplemented
    t = torch.tanh(0.5 * x.clamp(-1.0, 1.0))
    return torch.where(x.abs() < 1.0, 2.0 * t / (1.0 - t), torch.exp(x) - 1.0)


@_in_float64("aten::cos")
def cos(x: Tensor) -> Tensor:
    """aten::cos(Tensor self) -> Tensor: ``1 - 2 sin^2(x / 2)``."""
    half = torch.sin(0.5 * x)
    return 1.0 - 2.0 * half * half


@_in_float64("aten::tan")
def tan(x: Tensor) -> Tensor:
    """aten::tan(Tensor self) -> Tensor: ``sin(x) / cos(x)``."""
    return torch.sin(x) / cos(x)


@_in_float64("aten::cosh")
def cosh(x: Tensor) -> Tensor:
    """aten::cosh(Tensor self) -> Tensor: ``(exp(x) + exp(-x)) / 2``."""
    return 0.5 * (torch.exp(x) + torch.exp(-x))


@_in_float64("aten::sinh")
def sinh(x: Tensor) -> Tensor:
    """aten::sinh(Tensor self) -> Tensor

    ``(exp(x) - exp(-x)) / 2``; below 1 ``2 t / (1 - t^2)`` with ``t = tanh(x / 2)``.
    """
    t = torch.tanh(0.5 * x.clamp(-1.0, 1.0))
    far = 0.5 * (torch.exp(x) - torch.exp(-x))
    return torch.where(x.abs() < 1.0, 2.0 * t / (1.0 - t * t), far)


@_in_float64("aten::atan")
def atan(x: Tensor) -> Tensor:
    """aten::atan(Tensor self) -> Tensor

    ``pi / 2 - atan(1 / x)`` above 1, then three times ``2 atan(t / (1 + sqrt(1 + t^2)))``, then the
    series up to ``t^17``, for ``t < 0.1``.
    """
    size = x.abs()
    large = size > 1.0
    t = torch.where(large, 1.0 / torch.where(large, size, 1.0), size)
    for _ in range(3):
        t = t / (1.0 + (1.0 + t * t).sqrt())
    square = t * t
    series = torch.zeros_like(t)
    for power in range(17, 0, -2):
        series = series * square + (-1.0) ** (power // 2) / power
    angle = 8.0 * t * series
    return torch.where(large, 0.5 * math.pi - angle, angle) * x.sign()


@_in_float64("aten::atan2")
def atan2(y: Tensor, x: Tensor) -> Tensor:
    """aten::atan2(Tensor self, Tensor other) -> Tensor

    The angle of the point: ``atan(y / x)``, half a turn on where ``x < 0``.
    """
    zero = x == 0
    angle = atan(y / torch.where(zero, 1.0, x))
    turned = torch.where(x < 0, torch.where(y < 0, angle - math.pi, angle + math.pi), angle)
    return torch.where(zero, 0.5 * math.pi * y.sign(), turned)


@_in_float64("aten::asin")
def asin(x: Tensor) -> Tensor:
    """aten::asin(Tensor self) -> Tensor: ``2 atan(x / (1 + sqrt(1 - x^2)))``."""
    return 2.0 * atan(x / (1.0 + ((1.0 - x) * (1.0 + x)).sqrt()))


@_in_float64("aten::acos")
def acos(x: Tensor) -> Tensor:
    """aten::acos(Tensor self) -> Tensor: ``2 atan(sqrt(1 - x) / sqrt(1 + x))``."""
    return 2.0 * atan((1.0 - x).sqrt() / (1.0 + x).sqrt())


@_in_float64("aten::asinh")
def asinh(x: Tensor) -> Tensor:
    """aten::asinh(Tensor self) -> Tensor: ``log1p(|x| + x^2 / (1 + sqrt(1 + x^2)))``, signed."""
    size = x.abs()
    square = size * size
    result: Tensor = x.sign() * log1p(size + square / (1.0 + (1.0 + square).sqrt()))
    return result


@_in_float64("aten::acosh")
def acosh(x: Tensor) -> Tensor:
    """aten::acosh(Tensor self) -> Tensor

    ``log1p(t + sqrt(2 t + t^2))`` with ``t = x - 1``.
    """
    t = x - 1.0
    result: Tensor = log1p(t + (2.0 * t + t * t).sqrt())
    return result


@_in_float64("aten::atanh")
def atanh(x: Tensor) -> Tensor:
    """aten::atanh(Tensor self) -> Tensor: ``log1p(2 x / (1 - x)) / 2``."""
    result: Tensor = 0.5 * log1p(2.0 * x / (1.0 - x))
    return result


def _product(x: Tensor, dim: int) -> Tensor:
    """Halves the dimension by products until one element is left, which stays as a size of 1."""
    while x.shape[dim] > 1:
        half = x.shape[dim] // 2
        rest = x.narrow(dim, 2 * half, x.shape[dim] - 2 * half)
        product = x.narrow(dim, 0, half) * x.narrow(dim, half, half)
        x = torch.cat([product, rest], dim) if rest.shape[dim] else product
    return x


@_in_float64("aten::prod.dim_int")
def prod_dim(x: Tensor, dim: int, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """aten::prod.dim_int(Tensor self, int dim, bool keepdim=False, *, ScalarType? dtype=None) ->
    Tensor
    """
    if dtype not in (None, torch.float64) or not x.dim() or x.shape[dim] == 0:
        return NotImplemented
    result = _product(x, dim)
    return result if keepdim else result.squeeze(dim)


@_in_float64("aten::prod")
def prod(x: Tensor, *, dtype: Any = None) -> Any:
    """aten::prod(Tensor self, *, ScalarType? dtype=None) -> Tensor"""
    if dtype not in (None, torch.float64) or not x.dim() or not x.numel():
        return NotImplemented
    return _product(x.reshape(-1), 0).reshape(())


@_in_float64("prims::prod")
def prims_prod(x: Tensor, dims: Sequence[int] | None, *, output_dtype: Any = None) -> Any:
    """prims::prod(Tensor inp, int[]? dims, *, ScalarType? output_dtype=None) -> Tensor"""
    if output_dtype not in (None, torch.float64) or not x.numel():
        return NotImplemented
    dims = sorted(range(x.dim()) if dims is None else (dim % x.dim() for dim in dims))
    for dim in reversed(dims):
        x = _product(x, dim).squeeze(dim)
    return x
