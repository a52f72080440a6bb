"""The weight gradient of a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import onnx_ir as ir

from sam_export.lower.onnx_ops.table import per_axis, sizes, static
from sam_export.lower.onnx_training_ops.table import portable, training_form, training_op

_LARGE_IMAGE = 256
"""From more output pixels on ``ConvGrad`` is the faster one, up to this many a few large products.

The weight gradient alone, 32 images of 64 channels, 32x32: 12.9 against 15.9 ms; 16 channels: 1.4
against 1.9; of 48 channels, 12x12: 1.3 against 1.1; of 256, 8x8: 12.0 against 10.0.
"""

_MANY_PAIRS = 2**13
"""Pairs of channels from which it is the faster one for exactly so many pixels: 128 channels,
16x16: 12.5 against 14.5 ms; 64 to 128, 32x32 to 16x16: 6.8 against 9.9; 32 channels, 16x16: 1.2
against 1.1.
"""

_LARGE_IMAGE_1X1 = 16
"""The same for kernels of one pixel: 128 to 64 channels, 8x8, 0.28 against 0.39 ms; 4x4 equal."""

_ONE_CHANNEL = 64
"""The same for one input channel: 64 images, 8x8, 32 channels out, 0.073 against 0.136 ms."""


@training_form("aten::convolution_backward")
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
) -> Any:
    """aten::convolution_backward(Tensor grad_output, Tensor input, Tensor weight, SymInt[]?
    bias_sizes, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[]
    output_padding, SymInt groups, bool[3] output_mask) -> (Tensor, Tensor, Tensor)

    The weight gradient by ``ConvGrad`` where that pays; the input gradient is the portable form,
    which is as fast or faster everywhere (64 channels, 32x32: 39.0 against 42.8 ms in all).
    """
    options = (bias_sizes, stride, padding, dilation, transposed, output_padding, groups)
    other = portable("aten::convolution_backward")
    if not output_mask[1] or transposed or not _pays(dy, w, groups):
        return other(dy, x, w, *options, output_mask)
    dx, _, db = other(dy, x, w, *options, [output_mask[0], False, output_mask[2]])
    kernel = static("A convolution kernel", sizes(w)[2:])
    attributes = {
        "kernel_shape": kernel,
        "strides": per_axis(stride, len(kernel)),
        "pads": per_axis(padding, len(kernel)) * 2,
        "dilations": per_axis(dilation, len(kernel)),
        "group": groups,
    }
    dw = training_op("ConvGrad", [dy, x, w], [None, w], **attributes)[1]
    return dx, dw, db


def _pays(dy: ir.Value, w: ir.Value, groups: int) -> bool:
    """Whether ``ConvGrad`` is faster. In three dimensions its patches are copied one by one: 4
    images of 16 channels, 16x16x16, 30 against 3.4 ms.
    """
    out_channels, channels, *kernel = static("A convolution kernel", sizes(w))
    if dy.dtype != ir.DataType.FLOAT or len(kernel) > 2:
        return False
    pixels = prod(static("The image of a convolution", sizes(dy)[2:]))
    if groups > 1:
        return True
    if prod(kernel) == 1:
        return pixels > _LARGE_IMAGE_1X1
    if channels == 1:
        return pixels >= _ONE_CHANNEL
    many = channels * out_channels >= _MANY_PAIRS
    return pixels > _LARGE_IMAGE or (pixels == _LARGE_IMAGE and many)
