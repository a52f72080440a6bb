"""Operators in terms of simpler ones, where neither ONNX nor torch's own table has a form.

Each is written in torch and traced when a graph is lowered, so its sizes may be symbolic where it
does not loop over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sam_export.lower.onnx_ops.table import decomposition

# -- diagonals ------------------------------------------------------------------------------------


@decomposition("aten::diagonal_scatter")
def diagonal_scatter(x: Tensor, src: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """aten::diagonal_scatter(Tensor self, Tensor src, int offset=0, int dim1=0, int dim2=1) ->
    Tensor

    ``x`` with ``x[r, r + offset] = src[r - max(0, -offset)]``. torch's own decomposition writes in
    place.
    """
    moved = torch.movedim(x, (dim1, dim2), (-2, -1))
    rows, columns = moved.shape[-2:]
    row = torch.arange(rows, device=x.device)
    column = torch.arange(columns, device=x.device)
    on_diagonal = column - row.unsqueeze(1) == offset
    before = max(0, -offset)
    spread = torch.constant_pad_nd(src, [before, rows - before - src.shape[-1]])
    merged = torch.where(on_diagonal, spread.unsqueeze(-1), moved)
    return torch.movedim(merged, (-2, -1), (dim1, dim2))


@decomposition("aten::diagonal_backward")
def diagonal_backward(
    grad: Tensor, input_sizes: Sequence[int], offset: int, dim1: int, dim2: int
) -> Any:
    """aten::diagonal_backward(Tensor grad_output, SymInt[] input_sizes, int offset, int dim1, int
    dim2) -> Tensor

    Zero but for the diagonal.
    """
    return diagonal_scatter(grad.new_zeros(input_sizes), grad, offset, dim1, dim2)


# -- running maxima -------------------------------------------------------------------------------


def _running(better: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def form(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        if x.dim() == 0:
            return x.clone(), torch.zeros_like(x, dtype=torch.int64)
        size = x.shape[dim]
        shape = [1] * x.dim()
        shape[dim] = size
        places = torch.arange(size, device=x.device).reshape(shape).expand(x.shape)
        values, shift = x, 1
        # After the pass with shift s, element i holds the best of the last 2 s up to it.
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


@decomposition("aten::kthvalue")
def kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """aten::kthvalue(Tensor self, SymInt k, int dim=-1, bool keepdim=False) -> (Tensor values,
    Tensor indices)

    By a stable sort. Of ties ATen takes any.
    """
    if x.dim() == 0:
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    values, indices = (part.select(dim, k - 1) for part in torch.sort(x, stable=True, dim=dim))
    return (values.unsqueeze(dim), indices.unsqueeze(dim)) if keepdim else (values, indices)


@decomposition("aten::adaptive_max_pool2d")
@decomposition("aten::adaptive_max_pool3d")
def adaptive_max_pool(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """aten::adaptive_max_pool2d(Tensor self, int[2] output_size) -> (Tensor, Tensor); and in 3d.

    Window ``i`` of ``m`` over ``n`` pixels goes from ``floor(i n / m)`` to ``ceil((i + 1) n / m)``.
    All windows are gathered as if they were as large as the largest, the last pixel repeated.
    """
    image = [int(size) for size in x.shape[-len(output_size) :]]
    windows_of, pixels_of = 1, 1
    pixels = torch.zeros(1, 1, dtype=torch.int64, device=x.device)  # [window, pixel of the window]
    for size, count in zip(image, output_size, strict=True):
        longest = max(-(-(i + 1) * size // count) - i * size // count for i in range(count))
        window = torch.arange(count, device=x.device).unsqueeze(1)
        last = ((window + 1) * size + count - 1) // count - 1
        own = torch.minimum(window * size // count + torch.arange(longest, device=x.device), last)
        pixels = pixels.unsqueeze(1).unsqueeze(3) * size + own.unsqueeze(1)
        windows_of, pixels_of = windows_of * count, pixels_of * longest
        pixels = pixels.reshape(windows_of, pixels_of)
    lead = x.shape[: -len(output_size)]
    gathered = x.reshape(*lead, math.prod(image)).index_select(-1, pixels.reshape(-1))
    largest, place = gathered.reshape(*lead, *pixels.shape).max(-1)
    indices = torch.gather(pixels.expand(*lead, *pixels.shape), -1, place.unsqueeze(-1)).squeeze(-1)
    shape = [*lead, *output_size]
    return largest.reshape(shape), indices.reshape(shape)


# -- distances ------------------------------------------------------------------------------------


def _differences(x1: Tensor, x2: Tensor) -> Tensor:
    return x1.unsqueeze(-2) - x2.unsqueeze(-3)


@decomposition("aten::_cdist_forward")
def cdist(x1: Tensor, x2: Tensor, p: float, compute_mode: int | None) -> Tensor:
    """aten::_cdist_forward(Tensor x1, Tensor x2, float p, int? compute_mode) -> Tensor

    ``(sum_k |x1[.., i, k] - x2[.., j, k]|^p)^(1/p)``: the number of differences for ``p = 0``, the
    largest for infinity.
    """
    distance = _differences(x1, x2).abs()
    if p == 0:
        return (distance != 0).to(x1.dtype).sum(-1)
    if p == 1:
        return distance.sum(-1)
    if math.isinf(p):
        return distance.amax(-1)
    if p == 2:
        return (distance * distance).sum(-1).sqrt()
    return distance.pow(p).sum(-1).pow(1 / p)


@decomposition("aten::_cdist_backward")
def cdist_backward(grad: Tensor, x1: Tensor, x2: Tensor, p: float, cdist: Tensor) -> Tensor:
    """aten::_cdist_backward(Tensor grad, Tensor x1, Tensor x2, float p, Tensor cdist) -> Tensor

    ``sum_j grad[i, j] * sign(d) * (|d| / cdist[i, j])^(p - 1)`` with ``d = x1[i] - x2[j]``; zero
    where the distance is, as ATen has it.
    """
    d = _differences(x1, x2)
    distance, grad = cdist.unsqueeze(-1), grad.unsqueeze(-1)
    if p == 0:
        return torch.zeros_like(x1)
    if p == 1:
        return (grad * d.sign()).sum(-2)
    if math.isinf(p):
        return (grad * d.sign() * (d.abs() == distance).to(d.dtype)).sum(-2)
    apart = distance != 0
    if p == 2:
        parts = grad * d / torch.where(apart, distance, 1.0)
    else:
        # |d| = 0 has a part of zero, also for p < 1 where the power would be infinite.
        moved = d != 0
        size = torch.where(moved, d.abs(), 1.0)
        powers = (size / torch.where(apart, distance, 1.0)).pow(p - 1)
        parts = grad * d.sign() * powers
    return torch.where(apart, parts, 0.0).sum(-2)


# -- elementwise ----------------------------------------------------------------------------------


@decomposition("aten::fmax")
def fmax(x: Tensor, y: Tensor) -> Tensor:
    """aten::fmax(Tensor self, Tensor other) -> Tensor: the larger; of NaN and a number, the number.

    A NaN differs from itself.
    """
    return torch.where((x >= y) | (y != y), x, y)


@decomposition("aten::fmin")
def fmin(x: Tensor, y: Tensor) -> Tensor:
    """aten::fmin(Tensor self, Tensor other) -> Tensor: the smaller; of NaN and a number, the
    number."""
    return torch.where((x <= y) | (y != y), x, y)
