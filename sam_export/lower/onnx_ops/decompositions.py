"""Operators in terms of simpler ones, where neither ONNX nor torch's own table has a form.

Each is written in torch and traced when a graph is lowered, so its sizes may be symbolic where it
does not loop over them or read them; where it does, the export is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


# -- pooling --------------------------------------------------------------------------------------


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


def _pairs(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(count, count, 1, device=device).unbind(0)
    return first, second


@decomposition("aten::_pdist_forward")
def pdist(x: Tensor, p: float = 2.0) -> Tensor:
    """aten::_pdist_forward(Tensor self, float p=2.) -> Tensor: `cdist` of every pair of rows."""
    first, second = _pairs(x.shape[0], x.device)
    return cdist(x[first].unsqueeze(1), x[second].unsqueeze(1), p, None).reshape(-1)


@decomposition("aten::_pdist_backward")
def pdist_backward(grad: Tensor, x: Tensor, p: float, pdist: Tensor) -> Tensor:
    """aten::_pdist_backward(Tensor grad, Tensor self, float p, Tensor pdist) -> Tensor

    What a pair's distance gives to its first row, its second one gets with the sign turned.
    """
    first, second = _pairs(x.shape[0], x.device)
    rows, others = x[first].unsqueeze(1), x[second].unsqueeze(1)
    shape = (-1, 1, 1)
    part = cdist_backward(grad.reshape(shape), rows, others, p, pdist.reshape(shape)).squeeze(1)
    return torch.zeros_like(x).index_add(0, first, part).index_add(0, second, -part)


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


@decomposition("aten::signbit")
@decomposition("prims::signbit")
def signbit(x: Tensor) -> Tensor:
    """prims::signbit(Tensor self) -> Tensor: whether a number is negative, -0 included.

    ``1 / -0`` is minus infinity.
    """
    if not x.is_floating_point():
        return x < 0
    return (x < 0) | ((x == 0) & (1.0 / x < 0))


@decomposition("prims::hypot")
@decomposition("aten::hypot")
def hypot(x: Tensor, y: Tensor) -> Tensor:
    """aten::hypot(Tensor self, Tensor other) -> Tensor

    ``sqrt(x^2 + y^2) = m sqrt(1 + (n / m)^2)`` with the larger and the smaller size ``m``, ``n``:
    no square overflows.
    """
    x, y = x.abs(), y.abs()
    large, small = torch.maximum(x, y), torch.minimum(x, y)
    ratio = torch.where(large == 0, 0.0, small / large)
    return torch.where(torch.isinf(large), large, large * (1.0 + ratio * ratio).sqrt())


@decomposition("aten::logaddexp")
def logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """aten::logaddexp(Tensor self, Tensor other) -> Tensor

    ``log(exp(x) + exp(y)) = max + log(1 + exp(-|x - y|))``; the exporter's exponentials overflow.
    """
    same = torch.isinf(x) & (x == y)
    rest = torch.log1p(torch.exp(-(x - y).abs()))
    return torch.where(same, x, torch.maximum(x, y) + rest)


@decomposition("aten::logaddexp2")
def logaddexp2(x: Tensor, y: Tensor) -> Tensor:
    """aten::logaddexp2(Tensor self, Tensor other) -> Tensor: the same to the base of 2."""
    same = torch.isinf(x) & (x == y)
    rest = torch.log1p(torch.exp2(-(x - y).abs())) / math.log(2.0)
    return torch.where(same, x, torch.maximum(x, y) + rest)


# -- writing --------------------------------------------------------------------------------------


@decomposition("aten::masked_scatter_backward")
def masked_scatter_backward(grad: Tensor, mask: Tensor, sizes: Sequence[int]) -> Tensor:
    """aten::masked_scatter_backward(Tensor grad_output, Tensor mask, SymInt[] sizes) -> Tensor

    The gradient of the source: its k-th element went to the k-th place of the mask.
    """
    taken = mask.expand(grad.shape).reshape(-1)
    place = (taken.to(torch.int64).cumsum(0) - 1).clamp_min(0)
    kept = torch.where(taken, grad.reshape(-1), 0.0)
    return grad.new_zeros([math.prod(sizes)]).scatter_add(0, place, kept).reshape(sizes)


@decomposition("aten::_efficientzerotensor")
def efficient_zero_tensor(size: Sequence[int], dtype: torch.dtype | None = None, **_: Any) -> Any:
    """aten::_efficientzerotensor(SymInt[] size, *, ScalarType? dtype=None, ...) -> Tensor"""
    return torch.zeros(size, dtype=dtype)


@decomposition("aten::repeat_interleave.Tensor")
def repeat_interleave(repeats: Tensor, *, output_size: int | None = None) -> Any:
    """aten::repeat_interleave.Tensor(Tensor repeats, *, SymInt? output_size=None) -> Tensor

    The number ``i``, ``repeats[i]`` times: at place ``k`` as many as have ended before it.
    """
    if output_size is None:
        return NotImplemented  # the size of the result depends on values
    places = torch.arange(output_size, device=repeats.device)
    return (repeats.cumsum(0).unsqueeze(1) <= places).to(torch.int64).sum(0)


@decomposition("aten::put")
def put(x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    """aten::put(Tensor self, Tensor index, Tensor source, bool accumulate=False) -> Tensor

    ``x``, as a flat tensor, with ``source`` at ``index``.
    """
    flat, values = x.reshape(-1), source.reshape(-1)
    places = index.reshape(-1)
    places = torch.where(places < 0, places + flat.shape[0], places)
    written = flat.scatter_add if accumulate else flat.scatter
    return written(0, places, values).reshape(x.shape)


@decomposition("aten::index_reduce")
def index_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """aten::index_reduce(Tensor self, int dim, Tensor index, Tensor source, str reduce, *, bool
    include_self=True) -> Tensor

    ``scatter_reduce`` with the same index for each slice along ``dim``.
    """
    if x.dim() == 0:
        flat = (x.reshape(1), 0, index.reshape(-1), source.reshape(-1), reduce)
        return torch.scatter_reduce(*flat, include_self=include_self).reshape(())
    shape = [1] * x.dim()
    shape[dim] = -1
    places = index.reshape(shape).expand(source.shape)
    return torch.scatter_reduce(x, dim, places, source, reduce, include_self=include_self)


@decomposition("aten::as_strided_scatter")
@decomposition("prims::as_strided_scatter")
def as_strided_scatter(
    x: Tensor,
    src: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Tensor:
    """aten::as_strided_scatter(Tensor self, Tensor src, SymInt[] size, SymInt[] stride, SymInt?
    storage_offset=None) -> Tensor

    ``x``, laid out row by row, with ``src[i]`` at ``storage_offset + sum_d i_d * stride_d``.
    """
    place = torch.zeros((), dtype=torch.int64, device=x.device) + (storage_offset or 0)
    for extent, step in zip(size, stride, strict=True):
        place = place.unsqueeze(-1) + torch.arange(extent, device=x.device) * step
    flat = x.reshape(-1).scatter(0, place.reshape(-1), src.reshape(-1))
    return flat.reshape(x.shape)


# -- products -------------------------------------------------------------------------------------


@decomposition("aten::_trilinear")
def trilinear(
    i1: Tensor,
    i2: Tensor,
    i3: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    """aten::_trilinear(Tensor i1, Tensor i2, Tensor i3, int[] expand1, int[] expand2, int[]
    expand3, int[] sumdim, int unroll_dim=1) -> Tensor

    ``sum over sumdim of i1 * i2 * i3``, each with new dimensions where its ``expand`` says.
    """
    factors = []
    for factor, dims in ((i1, expand1), (i2, expand2), (i3, expand3)):
        for dim in dims:
            factor = factor.unsqueeze(dim)
        factors.append(factor)
    return (factors[0] * factors[1] * factors[2]).sum(list(sumdim))
