"""Sampling of an image at the points of a grid, and both gradients, in two and three dimensions.

With the *taps* of a point, the pixels that it is a mix of, each with an index, a weight and the
weight's derivative along each axis::

    y[n, c, p]  = sum_taps w * x[n, c, tap]
    dx[.., tap] += w * dy[.., p]
    dgrid[n, p, d] = scale_d * sum_{taps, c} (dw / dposition_d) * x[n, c, tap] * dy[n, c, p]

A tap is a product over the axes: two for each when linear, one when nearest, four when cubic.

Source: ATen's GridSampler.h; the cubic is that of R. Keys, "Cubic convolution interpolation for
digital image processing", 1981, https://doi.org/10.1109/TASSP.1981.1163711, with a = -3/4.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from sam_export.lower.onnx_ops.table import decomposition

_LINEAR, _NEAREST, _CUBIC = 0, 1, 2
_ZEROS, _BORDER, _REFLECTION = 0, 1, 2
_A = -0.75


@dataclass(frozen=True)
class _Tap:
    """One pixel along one axis, for every point of the grid.

    Attributes:
        index: Of the pixel, inside the image.
        weight: Zero where the pixel is outside.
        slope: Derivative of the weight by the position.
    """

    index: Tensor
    weight: Tensor
    slope: Tensor


def _reflected(position: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Position mirrored at both ends until it is between them, and the derivative of that."""
    span = high - low
    if span <= 0:
        return torch.zeros_like(position), torch.zeros_like(position)
    away = position - low
    sign = torch.where(away < 0, -1.0, 1.0).to(position.dtype)
    away = away.abs()
    flips = (away / span).floor()
    extra = away - flips * span
    even = (flips - 2.0 * (flips / 2.0).floor()) == 0
    inside = torch.where(even, extra + low, span - extra + low)
    return inside, torch.where(even, sign, -sign)


def _bounded(position: Tensor, size: int, padding: int, align: bool) -> tuple[Tensor, Tensor]:
    """Where a position outside the image looks, and the derivative of that."""
    one = torch.ones_like(position)
    if padding == _ZEROS:
        return position, one
    if padding == _REFLECTION:
        low, high = (0.0, size - 1.0) if align else (-0.5, size - 0.5)
        position, one = _reflected(position, low, high)
    inside = (position > 0) & (position < size - 1)
    return position.clamp(0, size - 1), torch.where(inside, one, 0.0)


def _tap(pixel: Tensor, size: int, weight: Tensor, slope: Tensor) -> _Tap:
    there = ((pixel >= 0) & (pixel <= size - 1)).to(weight.dtype)
    index = pixel.clamp(0, size - 1).to(torch.int64)
    return _Tap(index, weight * there, slope * there)


def _taps(grid: Tensor, size: int, mode: int, padding: int, align: bool) -> list[_Tap]:
    """The taps along one axis, for coordinates ``grid`` from -1 to 1."""
    scale = (size - 1) / 2 if align else size / 2
    position = (grid + 1) * scale if align else (grid + 1) * scale - 0.5
    if mode == _CUBIC:
        return _cubic_taps(position, size, padding, align, scale)
    position, slope = _bounded(position, size, padding, align)
    slope = slope * scale
    if mode == _NEAREST:
        return [_tap(position.round(), size, torch.ones_like(grid), torch.zeros_like(grid))]
    first = position.floor()
    part = position - first
    return [_tap(first, size, 1 - part, -slope), _tap(first + 1, size, part, slope)]


def _cubic_taps(position: Tensor, size: int, padding: int, align: bool, scale: float) -> list[_Tap]:
    first = position.floor()
    part = position - first
    taps = []
    for offset in (-1, 0, 1, 2):
        distance = (part - offset).abs()
        sign = torch.where(part < offset, -scale, scale).to(part.dtype)
        if offset in (0, 1):
            weight = ((_A + 2) * distance - (_A + 3)) * distance * distance + 1
            slope = (3 * (_A + 2) * distance - 2 * (_A + 3)) * distance
        else:
            weight = ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A
            slope = (3 * _A * distance - 10 * _A) * distance + 8 * _A
        pixel = _bounded(first + offset, size, padding, align)[0]
        taps.append(_tap(pixel, size, weight, slope * sign))
    return taps


def _all_taps(
    image: Sequence[int], grid: Tensor, mode: int, padding: int, align: bool
) -> list[tuple[_Tap, ...]]:
    """Every combination of one tap along each axis; the grid's last entry is the first axis."""
    axes = [
        _taps(grid[..., len(image) - 1 - axis], size, mode, padding, align)
        for axis, size in enumerate(image)
    ]
    return list(itertools.product(*axes))


def _flat_index(taps: Sequence[_Tap], image: Sequence[int]) -> Tensor:
    index = taps[0].index
    for tap, size in zip(taps[1:], image[1:], strict=True):
        index = index * size + tap.index
    return index.flatten(1)


@decomposition("aten::grid_sampler_2d")
@decomposition("aten::grid_sampler_3d")
def grid_sampler(
    x: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Tensor:
    """aten::grid_sampler_2d(Tensor input, Tensor grid, int interpolation_mode, int padding_mode,
    bool align_corners) -> Tensor; and in 3d.

    See the formulas of this module.
    """
    image = [int(size) for size in x.shape[2:]]
    pixels = x.flatten(2)
    y = None
    for taps in _all_taps(image, grid, interpolation_mode, padding_mode, align_corners):
        index = _flat_index(taps, image).unsqueeze(1).expand(-1, x.shape[1], -1)
        weight = prod((tap.weight for tap in taps[1:]), start=taps[0].weight).flatten(1)
        part = pixels.gather(2, index) * weight.unsqueeze(1)
        y = part if y is None else y + part
    assert y is not None
    return y.reshape(*x.shape[:2], *grid.shape[1:-1])


@decomposition("aten::grid_sampler_2d_backward")
@decomposition("aten::grid_sampler_3d_backward")
def grid_sampler_backward(
    grad: Tensor,
    x: Tensor,
    grid: Tensor,
    interpolation_mode: int,
    padding_mode: int,
    align_corners: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """aten::grid_sampler_2d_backward(Tensor grad_output, Tensor input, Tensor grid, int
    interpolation_mode, int padding_mode, bool align_corners, bool[2] output_mask) -> (Tensor,
    Tensor); and in 3d.

    See the formulas of this module.
    """
    image = [int(size) for size in x.shape[2:]]
    rank, channels = len(image), x.shape[1]
    pixels, dy = x.flatten(2), grad.flatten(2)
    dx = torch.zeros_like(pixels)
    slopes = [torch.zeros_like(dy[:, 0]) for _ in image]
    for taps in _all_taps(image, grid, interpolation_mode, padding_mode, align_corners):
        index = _flat_index(taps, image).unsqueeze(1).expand(-1, channels, -1)
        if output_mask[0]:
            weight = prod((tap.weight for tap in taps[1:]), start=taps[0].weight).flatten(1)
            dx = dx.scatter_add(2, index, dy * weight.unsqueeze(1))
        if interpolation_mode != _NEAREST:
            shown = (pixels.gather(2, index) * dy).sum(1)
            for axis in range(rank):
                factors = [tap.slope if d == axis else tap.weight for d, tap in enumerate(taps)]
                slopes[axis] = slopes[axis] + shown * prod(factors[1:], start=factors[0]).flatten(1)
    dgrid = torch.stack(slopes[::-1], -1).reshape(grid.shape)
    return dx.reshape(x.shape), dgrid
