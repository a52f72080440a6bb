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
the padded input, so that the sum over ``g`` and ``n`` is a matrix product (`patches`). Small images
with a 3x3 kernel have a form of ``y`` and ``dx`` that takes fewer products (`winograd`).

``dw`` is always a plain sum of its products, so that it is exactly zero where all of them are, as
in eager. That matters more than a rounding error of its size would: Adam divides by the size of the
gradient, so that in its first steps a residue of 1e-9 instead of zero moves a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

from sam_export.lower.onnx_ops import winograd
from sam_export.lower.onnx_ops.patches import (
    channels_first,
    channels_last,
    offsets,
    overlaps,
    padded,
    padded_images,
    patches,
    product_of_patches,
    spread_out,
)
from sam_export.lower.onnx_ops.table import ints, lowering, per_axis, scalar, sizes, static

_TINY_IMAGE = 16
"""Up to this many output pixels one product over the whole batch beats ``Conv`` (one per image).

ONNX Runtime's own matrix product is then a few columns wide. Measured at one thread, 64 images of
64 channels and 4x4 pixels: 1.0 against 1.2 ms forward, of which the weight gradient shares the
patches. With 64 pixels ``Conv`` is the faster one.
"""

_SMALL_IMAGE = 256
"""Up to this many output pixels the weight gradient is a product over the whole batch.

Measured at one thread in onnxruntime-training 1.19.2, 32 images, against one product per image:
64 to 128 channels, 16x16, stride 2: 14.1 against 20.8 ms; 128 to 256 channels, 8x8: 11.5 against
17.4; 64 channels, 32x32: 47 against 34.
"""

_SMALL_IMAGE_1X1 = 64
"""The same where the kernel is a single pixel, so that an image needs no patches: 16 images of 256
to 64 channels, 14x14: 1.2 against 1.0 ms; 8x8: 1.5 either way.
"""

_FEW_CHANNELS = 16
"""With fewer channels the patches of all kernel offsets are joined for one product.

64 images of 1 to 32 channels, 8x8: 0.11 against 0.40 ms; with 64 to 128 channels it is 17.6 against
14.1.
"""

_FEW_COLUMNS = 64
"""Up to this many rows of joined patches that holds for images of any size.

They then take no more memory than an activation of as many channels. 32 images of 3 to 16 channels,
32x32: 1.1 ms against 2.0 with one product per image.
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
    stride, padding, dilation = (per_axis(v, spatial) for v in (stride, padding, dilation))
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
                per_axis(output_padding, spatial),
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
    stride, padding, dilation = (per_axis(v, spatial) for v in (stride, padding, dilation))
    window = static("The image of a convolution", sizes(x)[2:])
    grid = static("The image of a convolution", sizes(dy)[2:])
    unused = scalar(0.0, dy)
    dx = dw = db = unused
    if transposed:
        if output_mask[0]:
            dx = _convolution(dy, w, None, stride, padding, dilation, groups)
            if _grid(grid, kernel[2:], stride, padding, dilation) != window:
                # An output padding as large as the stride has room for one more window.
                axes = range(2, 2 + spatial)
                dx = op.Slice(dx, ints(*[0] * spatial), ints(*window), ints(*axes))
        if output_mask[1]:
            dw = _weight_gradient(x, dy, kernel, window, stride, padding, dilation, groups)
    else:
        others = [*stride, *dilation, groups]
        if output_mask[0] and winograd.fits(x.dtype, kernel, sizes(x)[0], window, padding, others):
            dx = winograd.input_gradient(dy, w, window, padding)
        elif output_mask[0]:
            dx = _input_gradient(dy, w, kernel, window, grid, stride, padding, dilation, groups)
        if output_mask[1]:
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
    batch, _, *window = sizes(x)
    grid = _grid(window, sizes(w)[2:], stride, padding, dilation)
    if winograd.fits(x.dtype, sizes(w), batch, window, padding, [*stride, *dilation, groups]):
        y = winograd.convolution(x, w, static("The image of a convolution", window), padding)
        return y if b is None else op.Add(y, op.Reshape(b, ints(1, -1, 1, 1)))
    if not _as_product(x, groups, grid):
        extra = [] if b is None else [b]
        return op.Conv(
            x, w, *extra, strides=stride, pads=padding * 2, dilations=dilation, group=groups
        )
    kernel = static("A convolution kernel", sizes(w))
    known = static("The image of a convolution", grid)
    y = product_of_patches(channels_first(x, padding), w, kernel, known, stride, dilation, groups)
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
    before = [r - p for r, p in zip(reach, padding, strict=True)]
    after = [b + e for b, e in zip(before, rest, strict=True)]
    strided = any(t > 1 for t in stride)
    if (dy.dtype != ir.DataType.DOUBLE and strided) or not _as_product(dy, groups, window):
        if not strided and min(*before, *after) >= 0 and _flipping_pays(kernel, window, groups):
            pads = [*before, *after]
            return op.Conv(dy, _flipped(w, kernel, groups), pads=pads, dilations=dilation)
        options = {"strides": stride, "dilations": dilation, "group": groups}
        if all(e < t for e, t in zip(rest, stride, strict=True)):
            return op.ConvTranspose(dy, w, pads=padding * 2, output_padding=rest, **options)
        # ONNX Runtime is wrong for a larger one. It takes away from the padding behind the image;
        # what it has more than that is zeros that no window reaches.
        behind = [max(p - e, 0) for p, e in zip(padding, rest, strict=True)]
        zeros = [max(e - p, 0) for p, e in zip(padding, rest, strict=True)]
        dx = op.ConvTranspose(dy, w, pads=[*padding, *behind], **options)
        return op.Pad(dx, ints(*[0] * (len(rest) + 2), 0, 0, *zeros))
    # dx is the convolution, at stride 1, of dy spread out by the stride with the flipped kernel,
    # in which the channels of a group have changed places.
    spread = spread_out(channels_first(dy), kernel[0], grid, stride)
    spread = padded(spread, before, after)
    turned = [groups * kernel[1], kernel[0] // groups, *kernel[2:]]
    flipped = _flipped(w, kernel, groups)
    return product_of_patches(spread, flipped, turned, window, [1] * len(grid), dilation, groups)


def _flipping_pays(kernel: list[int], window: list[int], groups: int) -> bool:
    """Whether ``Conv`` with the flipped kernel beats ``ConvTranspose``.

    ``Conv`` makes patches of ``dy``, ``ConvTranspose`` of ``dx``: the one with fewer channels wins.
    Measured at one thread, 32 images, 32x32: 64 channels 22.3 against 24.2 ms; 64 to 16 channels
    10.5 against 6.2. A small image does not repay the flipping: 4 images of 256 channels, 8x8, 7.2
    against 5.9. Where there is nothing to flip, 16 images of 64 to 256 channels, 28x28: 3.2 against
    3.7.
    """
    if groups > 1:
        return False
    return prod(kernel[2:]) == 1 or (kernel[1] >= kernel[0] and prod(window) > 64)


def _flipped(w: ir.Value, kernel: list[int], groups: int) -> Any:
    """The kernel of the convolution that is ``dx``, of shape ``[C, O / groups, *K]``."""
    axes = list(range(2, len(kernel)))
    if prod(kernel[2:]) > 1:
        w = op.Slice(
            w,
            ints(*[-1] * len(axes)),
            ints(*[-(2**62)] * len(axes)),
            ints(*axes),
            ints(*[-1] * len(axes)),
        )
    if groups == 1:
        return op.Transpose(w, perm=[1, 0, *axes])
    per_group = kernel[0] // groups
    w = op.Reshape(w, ints(groups, per_group, *kernel[1:]))
    w = op.Transpose(w, perm=[0, 2, 1, *(axis + 1 for axis in axes)])
    return op.Reshape(w, ints(groups * kernel[1], per_group, *kernel[2:]))


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
    taps = prod(window)
    small = prod(grid) <= (_SMALL_IMAGE_1X1 if taps == 1 else _SMALL_IMAGE)
    few = taps > 1 and taps * channels <= _FEW_COLUMNS
    joins = channels < _FEW_CHANNELS and (small or few)
    if groups == 1 and (small or joins):
        # Batch last, or all but the channels first: slices are then copies of long runs.
        rows = channels_first(dy)
        if joins:
            rows = op.Reshape(rows, ints(out_channels, -1))
            image = channels_first(x, padding)
            columns = patches(image, channels, window, grid, stride, dilation)
            product = op.MatMul(rows, op.Transpose(columns, perm=[1, 0]))
            product = op.Reshape(product, ints(out_channels, *window, channels))
            return op.Transpose(product, perm=[0, len(kernel) - 1, *axes])
        size = static("The image of a convolution", sizes(x)[2:])
        pairs = overlaps(channels_last(x), rows, window, size, grid, stride, padding, dilation)
        nothing = op.Expand(scalar(0.0, x), ints(out_channels, channels))
        parts = [
            nothing
            if pair is None
            else op.MatMul(
                op.Reshape(pair[0], ints(out_channels, -1)), op.Reshape(pair[1], ints(-1, channels))
            )
            for pair in pairs
        ]
        return _joined(parts, kernel)
    images = padded_images(x, padding)
    # [N, groups, channels of the group, pixels]; one group is no dimension.
    split = [groups] if groups > 1 else []
    rows = op.Reshape(dy, ints(0, *split, out_channels // groups, -1))
    last = 2 + len(split)
    parts = []
    for slice_ in offsets(images, window, grid, stride, dilation, first_axis=2):
        image = op.Reshape(slice_, ints(0, *split, channels, -1))
        if channels == 1:  # depthwise: no matrix product to win anything by
            part = op.ReduceSum(op.Mul(rows, image), ints(0, last), keepdims=0)
        else:
            image = op.Transpose(image, perm=[*range(last - 1), last, last - 1])
            part = op.ReduceSum(op.MatMul(rows, image), ints(0), keepdims=0)
        parts.append(part)
    return _joined(parts, kernel)


def _joined(parts: list[Any], kernel: list[int]) -> Any:
    """The gradient of the kernel from those of its offsets, of ``O * C`` elements each."""
    rows = [op.Reshape(part, ints(1, -1)) for part in parts]
    joined = op.Transpose(op.Concat(*rows, axis=0), perm=[1, 0]) if len(rows) > 1 else rows[0]
    return op.Reshape(joined, ints(*kernel))


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
