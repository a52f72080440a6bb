"""Patches of images: the slices that turn a convolution into a matrix product.

For each kernel offset the strided slice of the padded input, so that a sum over pixels and images
is a matrix product (see `convolution`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

from sam_export.lower.onnx_ops.table import ints, sizes, static


def product_of_patches(
    columns_of: Any,
    w: Any,
    kernel: list[int],
    grid: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Any:
    """Convolution of a padded ``[C, *S, N]`` image with ``w``, as ``[N, O, *G]``."""
    out_channels, channels, *window = kernel
    columns = patches(columns_of, groups * channels, window, grid, stride, dilation)
    axes = list(range(2, 2 + len(grid)))
    rows = op.Transpose(w, perm=[0, *axes, 1])
    if groups == 1:
        rows = op.Reshape(rows, ints(out_channels, -1))
    else:
        rows = op.Reshape(rows, ints(groups, out_channels // groups, -1))
        columns = op.Reshape(columns, ints(prod(window), groups, channels, -1))
        columns = op.Transpose(columns, perm=[1, 0, 2, 3])
        columns = op.Reshape(columns, ints(groups, prod(window) * channels, -1))
    product = op.Reshape(op.MatMul(rows, columns), ints(out_channels, *grid, -1))
    return op.Transpose(product, perm=[1 + len(grid), *range(1 + len(grid))])


def patches(
    image: Any,
    channels: int,
    window: list[int],
    grid: list[int],
    stride: list[int],
    dilation: list[int],
) -> Any:
    """``[K * C, G * N]`` from a padded ``[C, *S, N]`` image."""
    parts = list(offsets(image, window, grid, stride, dilation, first_axis=1))
    joined = op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0]
    return op.Reshape(joined, ints(prod(window) * channels, -1))


def offsets(
    image: Any,
    window: list[int],
    grid: list[int],
    stride: list[int],
    dilation: list[int],
    first_axis: int,
) -> Any:
    axes = ints(*range(first_axis, first_axis + len(grid)))
    for offset in itertools.product(*(range(k) for k in window)):
        starts = [o * d for o, d in zip(offset, dilation, strict=True)]
        ends = [a + (g - 1) * t + 1 for a, g, t in zip(starts, grid, stride, strict=True)]
        yield op.Slice(image, ints(*starts), ints(*ends), axes, ints(*stride))


def spread_out(image: Any, channels: int, grid: list[int], stride: list[int]) -> Any:
    """Puts ``stride - 1`` zeros between the pixels of a ``[C, *G, N]`` image."""
    if all(t == 1 for t in stride):
        return image
    pairs = [size for g in grid for size in (g, 1)]
    image = op.Reshape(image, ints(channels, *pairs, -1))
    after = [extra for t in stride for extra in (0, t - 1)]
    image = op.Pad(image, ints(0, *[0] * len(pairs), 0, 0, *after, 0))
    spread = [g * t for g, t in zip(grid, stride, strict=True)]
    image = op.Reshape(image, ints(channels, *spread, -1))
    # The zeros behind the last pixel go: they are part of the padding.
    ends = [(g - 1) * t + 1 for g, t in zip(grid, stride, strict=True)]
    axes = ints(*range(1, 1 + len(grid)))
    return op.Slice(image, ints(*[0] * len(grid)), ints(*ends), axes)


def overlaps(
    x: Any,
    dy: Any,
    window: list[int],
    image: list[int],
    grid: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Iterator[tuple[Any, Any] | None]:
    """For each kernel offset the pixels of ``dy`` and those of ``x`` that it multiplies.

    What the padding would add, zeros, is cut away on both sides: of a 3x3 kernel on 2x2 pixels 16
    of 36 products are left.

    Args:
        x: ``[*S, N, C]``, without padding.
        dy: ``[O, *G, N]``.
        window: Sizes of the kernel.
        image: ``S``.
        grid: ``G``.
        stride: As of the convolution.
        padding: As of the convolution.
        dilation: As of the convolution.

    Yields:
        The slices of ``dy`` and of ``x``, equally many pixels; None where there is nothing but
        padding.
    """
    axes = range(len(grid))
    for offset in itertools.product(*(range(k) for k in window)):
        # Output pixel g meets input pixel g * stride + shift.
        shift = [o * d - p for o, d, p in zip(offset, dilation, padding, strict=True)]
        first = [max(0, -(s // t)) for s, t in zip(shift, stride, strict=True)]
        last = [min(grid[a] - 1, (image[a] - 1 - shift[a]) // stride[a]) for a in axes]
        if any(b < a for a, b in zip(first, last, strict=True)):
            yield None
            continue
        starts = [first[a] * stride[a] + shift[a] for a in axes]
        ends = [last[a] * stride[a] + shift[a] + 1 for a in axes]
        yield (
            _cut(dy, first, [end + 1 for end in last], [1] * len(grid), grid, first_axis=1),
            _cut(x, starts, ends, stride, image, first_axis=0),
        )


def _cut(
    value: Any,
    starts: list[int],
    ends: list[int],
    steps: list[int],
    whole: list[int],
    first_axis: int,
) -> Any:
    """A slice along those axes where it is not the whole."""
    cuts = zip(starts, ends, steps, strict=True)
    axes = [axis for axis, cut in enumerate(cuts) if cut != (0, whole[axis], 1)]
    if not axes:
        return value
    given = ([values[axis] for axis in axes] for values in (starts, ends, steps))
    start, end, step = (ints(*values) for values in given)
    return op.Slice(value, start, end, ints(*(first_axis + axis for axis in axes)), step)


def channels_first(x: ir.Value, padding: Sequence[int] = ()) -> Any:
    """``[N, C, *S]`` to a padded ``[C, *S, N]``."""
    shape = static("An image", sizes(x)[1:])
    # As a matrix of two axes: ONNX Runtime moves the axis of an array of four three times slower.
    turned = op.Transpose(op.Reshape(x, ints(-1, prod(shape))), perm=[1, 0])
    return padded(op.Reshape(turned, ints(*shape, -1)), padding, padding)


def channels_last(x: ir.Value) -> Any:
    """``[N, C, *S]`` to ``[*S, N, C]``."""
    channels, *image = static("An image", sizes(x)[1:])
    turned = op.Transpose(op.Reshape(x, ints(-1, prod(image))), perm=[1, 0])
    return op.Reshape(turned, ints(*image, -1, channels))


def padded(image: Any, before: Sequence[int], after: Sequence[int]) -> Any:
    """Pads (or, where negative, crops) the spatial sizes of ``[C, *S, N]``."""
    if not any(before) and not any(after):
        return image
    return op.Pad(image, ints(0, *before, 0, 0, *after, 0))


def padded_images(x: ir.Value, padding: list[int]) -> Any:
    if not any(padding):
        return x
    return op.Pad(x, ints(0, 0, *padding, 0, 0, *padding))
