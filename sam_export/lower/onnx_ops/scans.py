"""Running maxima, minima and products along a dimension, in simpler operators.

A pass with shift ``s`` joins element ``i`` with element ``i - s``; after the passes with shifts 1,
2, 4, ... it holds the result of all elements up to ``i``.

Source: W. D. Hillis, G. L. Steele, "Data parallel algorithms", 1986,
    https://doi.org/10.1145/7902.7903
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sam_export.lower.onnx_ops.table import decomposition


def _running(better: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def form(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        if x.dim() == 0:
            return x.clone(), torch.zeros_like(x, dtype=torch.int64)
        size = x.shape[dim]
        shape = [1] * x.dim()
        shape[dim] = size
        places = torch.arange(size, device=x.device).reshape(shape).expand(x.shape)
        values, shift = x, 1
        while shift < size:
            earlier = values.narrow(dim, 0, size - shift)
            earlier_places = places.narrow(dim, 0, size - shift)
            later = values.narrow(dim, shift, size - shift)
            wins = better(later, earlier) | later.isnan()
            head, head_places = values.narrow(dim, 0, shift), places.narrow(dim, 0, shift)
            values = torch.cat([head, torch.where(wins, later, earlier)], dim)
            kept = places.narrow(dim, shift, size - shift)
            places = torch.cat([head_places, torch.where(wins, kept, earlier_places)], dim)
            shift *= 2
        return values, places

    return form


# aten::cummax(Tensor self, int dim) -> (Tensor values, Tensor indices); of ties the last one.
decomposition("aten::cummax")(_running(lambda later, earlier: later >= earlier))
# aten::cummin(Tensor self, int dim) -> (Tensor values, Tensor indices)
decomposition("aten::cummin")(_running(lambda later, earlier: later <= earlier))


@decomposition("aten::cumprod")
def cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """aten::cumprod(Tensor self, int dim, *, ScalarType? dtype=None) -> Tensor"""
    if dtype is None:
        dtype = x.dtype if x.is_floating_point() else torch.int64
    values = x.to(dtype)
    if x.dim() == 0:
        return values.clone()
    size, shift = x.shape[dim], 1
    while shift < size:
        product = values.narrow(dim, shift, size - shift) * values.narrow(dim, 0, size - shift)
        values = torch.cat([values.narrow(dim, 0, shift), product], dim)
        shift *= 2
    return values


@decomposition("aten::logcumsumexp")
def logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """aten::logcumsumexp(Tensor self, int dim) -> Tensor

    ``log(sum of exp(x) up to here)``, each pass by `torch.logaddexp`, so that no exponential
    overflows.
    """
    if x.dim() == 0:
        return x.clone()
    size, shift, values = x.shape[dim], 1, x
    while shift < size:
        joined = torch.logaddexp(
            values.narrow(dim, shift, size - shift), values.narrow(dim, 0, size - shift)
        )
        values = torch.cat([values.narrow(dim, 0, shift), joined], dim)
        shift *= 2
    return values
