"""The weight gradient of a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import onnx_ir as ir

from sam_export.lower.onnx_ops import winograd
from sam_export.lower.onnx_ops.table import sizes, static
from sam_export.lower.onnx_training_ops.table import portable, training_form, training_op

_LARGE_IMAGE = 256
"""From more output pixels on ``ConvGrad`` is the faster one, up to this many a few large products.

At one thread, weight gradient with forward and input gradient: 32 images of 64 channels, 32x32:
39.0 against 42.6 ms; 3 to 64 channels, 7x7, 112x112: 5.8 against 18.9. 32 images of 48 channels,
12x12, alone: 2.5 against 2.3.
"""

_LARGE_PRODUCTS = 2**21
"""The same from so many output pixels times pairs of channels on: then its products, one for each
image, are large. 32 images of 64 to 128 channels, 32x32 to 16x16: 21.0 against 25.0 ms; 128 to 256,
16x16 to 8x8: 18.3 against 19.8; 8 images of 512 channels, 7x7, alone: 19.3 against 23.8. Below: 256
channels, 8x8 to 4x4, 7.4 against 6.6.
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
    if not output_mask[1] or transposed or not _pays(dy, x, w, stride, padding, dilation, groups):
        return other(dy, x, w, *options, output_mask)
    dx, _, db = other(dy, x, w, *options, [output_mask[0], False, output_mask[2]])
    kernel = static("A convolution kernel", sizes(w)[2:])
    attributes = {
        "kernel_shape": kernel,
        "strides": _spread(stride, len(kernel)),
        "pads": _spread(padding, len(kernel)) * 2,
        "dilations": _spread(dilation, len(kernel)),
        "group": groups,
    }
    dw = training_op("ConvGrad", [dy, x, w], [None, w], **attributes)[1]
    return dx, dw, db


def _pays(
    dy: ir.Value,
    x: ir.Value,
    w: ir.Value,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """Whether ``ConvGrad`` is faster. In three dimensions its patches are copied one by one: 4
    images of 16 channels, 16x16x16, 30 against 3.4 ms.
    """
    batch, _, *window = sizes(x)
    out_channels, channels, *kernel = static("A convolution kernel", sizes(w))
    spatial = len(kernel)
    if dy.dtype != ir.DataType.FLOAT or spatial > 2:
        return False
    others = [*_spread(stride, spatial), *_spread(dilation, spatial), groups]
    if winograd.fits(x.dtype, sizes(w), batch, window, _spread(padding, spatial), others):
        return False
    pixels = prod(static("The image of a convolution", sizes(dy)[2:]))
    if groups > 1:
        return True
    if prod(kernel) == 1:
        return pixels > _LARGE_IMAGE_1X1
    if channels == 1:
        return pixels >= _ONE_CHANNEL
    return pixels > _LARGE_IMAGE or pixels * channels * out_channels >= _LARGE_PRODUCTS


def _spread(values: Sequence[int], spatial: int) -> list[int]:
    return list(values) * spatial if len(values) == 1 else list(values)
