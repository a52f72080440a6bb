"""Convolution and its gradients.

With ``x[N, C, *S]``, ``w[O, C, *K]``, ``dy[N, O, *G]`` (``S``, ``K``, ``G``: spatial sizes)::

    y[n, o, g]  = sum_{c, k} w[o, c, k] * x[n, c, g * stride + k * dilation - padding]
    dx          = the transposed convolution of dy with w
    dw[o, c, k] = sum_{n, g} dy[n, o, g] * x[n, c, g * stride + k * dilation - padding]

With ``groups``, ``w`` is ``[O, C / groups, *K]`` and each group of channels is a convolution of its
own. A transposed convolution is the ``dx`` above as a function of ``dy`` and ``w``; so its gradient
for its input is the ``y`` above, and for its weight ``dw`` with ``x`` and ``dy`` in each other's
place.

ONNX has an operator for ``y`` and for ``dx``, none for ``dw``; and ONNX Runtime's CPU has none of
them in float64. Both are written with *patches*: for each kernel offset ``k`` the strided slice of
the padded input, so that the sum over ``g`` and ``n`` is a matrix product.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod
from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

from sam_export.lower.onnx_ops.table import ints, lowering, scalar, sizes, static

_TINY_IMAGE = 16
"""Up to this many output pixels one product over the whole batch beats ``Conv`` (one per image).

ONNX Runtime's own matrix product is then a few columns wide. Measured at one thread, 64 images of
64 channels and 4x4 pixels: 1.0 against 1.2 ms forward, of which the weight gradient shares the
patches. With 64 pixels ``Conv`` is the faster one.
"""

_SMALL_IMAGE = 256
"""Up to this many output pixels the weight gradient is one product over the whole batch.

Measured at one thread in onnxruntime-training 1.19.2: with 16 pixels 0.56 against 1.08 ms, with
1024 pixels 47 against 34 ms.
"""


@lowering("aten::convolution")
def convolution(
    x: ir.Value,
    w: ir.Value,
    b: ir.Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """aten::convolution(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[]
    padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups) -> Tensor

    ONNX ``Conv`` is the same sum; in float64 it is written as patches and a matrix product.
    """
    spatial = len(sizes(w)) - 2
    stride, padding, dilation = (_spread(v, spatial) for v in (stride, padding, dilation))
    if transposed:
        kernel = static("A convolution kernel", sizes(w))
        grid = static("The image of a transposed convolution", sizes(x)[2:])
        window = [
            (g - 1) * t - 2 * p + d * (k - 1) + 1 + e
            for g, k, t, p, d, e in zip(
                grid,
                kernel[2:],
                stride,
                padding,
                dilation,
                _spread(output_padding, spatial),
                strict=True,
            )
        ]
        y = _input_gradient(x, w, kernel, window, grid, stride, padding, dilation, groups)
        return y if b is None else op.Add(y, op.Reshape(b, ints(1, -1, *[1] * spatial)))
    return _convolution(x, w, b, stride, padding, dilation, groups)


@lowering("aten::convolution_backward")
def convolution_backward(
    dy: ir.Value,
    x: ir.Value,
    w: ir.Value,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Any, Any, Any]:
    """aten::convolution_backward(Tensor grad_output, Tensor input, Tensor weight, SymInt[]?
    bias_sizes, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[]
    output_padding, SymInt groups, bool[3] output_mask) -> (Tensor, Tensor, Tensor)

    See the formulas of this module. An output that is masked out is a constant nobody reads.
    """
    del bias_sizes, output_padding
    kernel = static("A convolution kernel", sizes(w))
    spatial = len(kernel) - 2
    stride, padding, dilation = (_spread(v, spatial) for v in (stride, padding, dilation))
    window = static("The image of a convolution", sizes(x)[2:])
    grid = static("The image of a convolution", sizes(dy)[2:])
    unused = scalar(0.0, dy)
    dx = dw = db = unused
    if transposed:
        if output_mask[0]:
            dx = _convolution(dy, w, None, stride, padding, dilation, groups)
        if output_mask[1]:
            dw = _weight_gradient(x, dy, kernel, window, stride, padding, dilation, groups)
    elif output_mask[0]:
        dx = _input_gradient(dy, w, kernel, window, grid, stride, padding, dilation, groups)
    if output_mask[1] and not transposed:
        dw = _weight_gradient(dy, x, kernel, grid, stride, padding, dilation, groups)
    if output_mask[2]:
        db = op.ReduceSum(dy, ints(0, *range(2, 2 + spatial)), keepdims=0)
    return dx, dw, db


def _convolution(
    x: ir.Value,
    w: ir.Value,
    b: ir.Value | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Any:
    grid = _grid(sizes(x)[2:], sizes(w)[2:], stride, padding, dilation)
    if not _as_product(x, groups, grid):
        extra = [] if b is None else [b]
        return op.Conv(
            x, w, *extra, strides=stride, pads=padding * 2, dilations=dilation, group=groups
        )
    kernel = static("A convolution kernel", sizes(w))
    known = static("The image of a convolution", grid)
    y = _product(_channels_first(x, padding), w, kernel, known, stride, dilation, groups)
    if b is not None:
        y = op.Add(y, op.Reshape(b, ints(1, -1, *[1] * len(stride))))
    return y


def _input_gradient(
    dy: ir.Value,
    w: ir.Value,
    kernel: list[int],
    window: list[int],
    grid: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Any:
    reach = [d * (k - 1) for d, k in zip(dilation, kernel[2:], strict=True)]
    # Input pixels behind the last window that no window reaches: ConvTranspose's output_padding.
    rest = [
        s - ((g - 1) * t - 2 * p + r + 1)
        for s, g, t, p, r in zip(window, grid, stride, padding, reach, strict=True)
    ]
    strided = dy.dtype != ir.DataType.DOUBLE and any(t > 1 for t in stride)
    if strided or not _as_product(dy, groups, window):
        return op.ConvTranspose(
            dy,
            w,
            strides=stride,
            pads=padding * 2,
            dilations=dilation,
            output_padding=rest,
            group=groups,
        )
    # dx is the convolution, at stride 1, of dy spread out by the stride with the flipped kernel,
    # in which the channels of a group have changed places.
    before = [r - p for r, p in zip(reach, padding, strict=True)]
    after = [b + e for b, e in zip(before, rest, strict=True)]
    spread = _spread_out(op.Transpose(dy, perm=_batch_last(len(grid))), kernel[0], grid, stride)
    spread = _padded(spread, before, after)
    axes = list(range(2, 2 + len(grid)))
    flipped = op.Slice(
        w,
        ints(*[-1] * len(axes)),
        ints(*[-(2**62)] * len(axes)),
        ints(*axes),
        ints(*[-1] * len(axes)),
    )
    per_group = kernel[0] // groups
    turned = [groups * kernel[1], per_group, *kernel[2:]]
    if groups == 1:
        flipped = op.Transpose(flipped, perm=[1, 0, *axes])
    else:
        flipped = op.Reshape(flipped, ints(groups, per_group, *kernel[1:]))
        flipped = op.Transpose(flipped, perm=[0, 2, 1, *(axis + 1 for axis in axes)])
        flipped = op.Reshape(flipped, ints(*turned))
    return _product(spread, flipped, turned, window, [1] * len(grid), dilation, groups)


def _weight_gradient(
    dy: ir.Value,
    x: ir.Value,
    kernel: list[int],
    grid: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Any:
    out_channels, channels, *window = kernel
    axes = list(range(1, 1 + len(grid)))
    if groups == 1 and prod(grid) <= _SMALL_IMAGE:
        # Channels first and batch last: patches are then copies of long runs.
        columns = _patches(_channels_first(x, padding), channels, window, grid, stride, dilation)
        rows = op.Reshape(op.Transpose(dy, perm=_batch_last(len(grid))), ints(out_channels, -1))
        product = op.MatMul(rows, op.Transpose(columns, perm=[1, 0]))
        product = op.Reshape(product, ints(out_channels, *window, channels))
        return op.Transpose(product, perm=[0, len(kernel) - 1, *axes])
    padded = _padded_images(x, padding)
    # [N, groups, channels of the group, pixels]; one group is no dimension.
    split = [groups] if groups > 1 else []
    rows = op.Reshape(dy, ints(0, *split, out_channels // groups, -1))
    last = 2 + len(split)
    parts = []
    for slice_ in _slices(padded, window, grid, stride, dilation, first_axis=2):
        image = op.Reshape(slice_, ints(0, *split, channels, -1))
        if channels == 1:  # depthwise: no matrix product to win anything by
            part = op.ReduceSum(op.Mul(rows, image), ints(0, last), keepdims=0)
        else:
            image = op.Transpose(image, perm=[*range(last - 1), last, last - 1])
            part = op.ReduceSum(op.MatMul(rows, image), ints(0), keepdims=0)
        parts.append(op.Reshape(part, ints(out_channels, channels, 1)))
    joined = op.Concat(*parts, axis=2) if len(parts) > 1 else parts[0]
    return op.Reshape(joined, ints(*kernel))


def _product(
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
    columns = _patches(columns_of, groups * channels, window, grid, stride, dilation)
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


def _patches(
    image: Any,
    channels: int,
    window: list[int],
    grid: list[int],
    stride: list[int],
    dilation: list[int],
) -> Any:
    """``[K * C, G * N]`` from a padded ``[C, *S, N]`` image."""
    parts = list(_slices(image, window, grid, stride, dilation, first_axis=1))
    joined = op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0]
    return op.Reshape(joined, ints(prod(window) * channels, -1))


def _slices(
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


def _spread_out(image: Any, channels: int, grid: list[int], stride: list[int]) -> Any:
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


def _channels_first(x: ir.Value, padding: list[int]) -> Any:
    """``[N, C, *S]`` to a padded ``[C, *S, N]``."""
    return _padded(op.Transpose(x, perm=_batch_last(len(padding))), padding, padding)


def _padded(image: Any, before: list[int], after: list[int]) -> Any:
    """Pads (or, where negative, crops) the spatial sizes of ``[C, *S, N]``."""
    if not any(before) and not any(after):
        return image
    return op.Pad(image, ints(0, *before, 0, 0, *after, 0))


def _padded_images(x: ir.Value, padding: list[int]) -> Any:
    if not any(padding):
        return x
    return op.Pad(x, ints(0, 0, *padding, 0, 0, *padding))


def _batch_last(spatial: int) -> list[int]:
    return [*range(1, 2 + spatial), 0]


def _grid(
    window: Sequence[int | None],
    kernel: Sequence[int | None],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> list[int | None]:
    """Output sizes; None where the input's is symbolic."""
    return [
        None if s is None or k is None else (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip(window, kernel, stride, padding, dilation, strict=True)
    ]


def _as_product(value: ir.Value, groups: int, pixels: Sequence[int | None]) -> bool:
    """Whether a convolution is written as patches: it has to be in float64, it pays when tiny."""
    if value.dtype == ir.DataType.DOUBLE:
        return True
    known = [size for size in pixels if size is not None]
    return groups == 1 and len(known) == len(pixels) and prod(known) <= _TINY_IMAGE


def _spread(values: Sequence[int], spatial: int) -> list[int]:
    return list(values) * spatial if len(values) == 1 else list(values)
