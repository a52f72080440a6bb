"""3x3 convolutions of small images, and their input gradients, by Winograd's F(2, 3).

Along one axis, two neighbouring outputs of a kernel of three take 4 products instead of 6::

    y = A^T [ (G w) * (B^T x) ]        x: 4 inputs, w: 3 weights, y: 2 outputs

and along two axes 16 instead of 36. With *tiles* of two by two outputs, the 16 *positions* of a
tile are independent sums over the channels, that is 16 matrix products. All maps are linear and the
same for every image and channel, so along each spatial axis they are one constant matrix that also
holds the padding, the overlap of the tiles and, where the image is odd, the part of a tile that is
left over::

    u = (G (x) G) w          [4, 4, O, C]         of the kernel
    v = B^T x                [4 T, 4 U, N, C]     x with T x U tiles, along both axes
    y = A^T (v u)                                 forward
    d = A dy                 [4 T, 4 U, N, O]
    dx = B (d u)                                  the transposed maps

It is exact but for rounding: relative to float64, 2.7 eps (float32, 256 channels, 8x8) where ONNX
Runtime's ``Conv`` has 1.7.

A sum without a term that is not zero stays exactly zero: where the three inputs of ``y[0]`` are
zero, so are the three of ``v`` that ``A`` picks for it, and likewise for ``y[1]`` and for ``dx``.
The weight gradient has such a form too, ``dw = (G (x) G)^T sum_{tiles, n} d v``, but there it is
not so: ``dw[0] = dy[0] x[0] + dy[1] x[1]`` takes in ``dy[0] x[2]`` three times, with factors 1/2,
1/2 and -1, and rounding leaves some of it. After ReLU, and at the border of a small image, many
weights meet nothing but zeros, eager's gradient of them is exactly zero, and Adam, which divides by
the size of the gradient, makes a whole step of what is left (of 1e-9 a tenth of one). Therefore
weight gradients are sums of slices (`convolution`), which were measured to be as fast.

Source: A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016,
https://arxiv.org/abs/1509.09308, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import opset18 as op

from sam_export.lower.onnx_ops.table import ints, sizes

Matrix = NDArray[np.floating[Any]]

_B = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float64)
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float64)
_A = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float64)

_LARGEST = 16
"""The longest axis of an image.

The constant matrices are dense, so their share grows with the image, and ``v`` and ``d`` are four
times ``x`` and ``dy``.
"""

_CHANNELS_PER_PIXEL = 4
"""Channels, at least, for each pixel along the longest axis.

Measured at one thread in onnxruntime-training 1.19.2, milliseconds of the best other forms, forward
and both gradients, against these: 32 images of 64 channels, 8x8: 3.1 and 2.3; 256 channels, 8x8: 37
and 28; 64 channels, 16x16: 12.6 and 13.9; 128 channels, 16x16: 40 either way; 64 images of 64
channels, 4x4: 1.5 and 1.0; 2x2: 0.37 and 0.23. With 64 channels and 32x32 it is 69 and 123.
"""

_ROWS = 128
"""Rows, at least, of the 16 matrix products: tiles times images.

4 images of 256 channels and 8x8 pixels have 64, and the transformed kernel then outweighs them: 7.4
against 8.9 ms.
"""


@dataclass(frozen=True)
class Maps:
    """The constant matrices of one convolution.

    Attributes:
        inputs: For each spatial axis ``B^T``, of shape [4 tiles, pixels of x].
        outputs: For each spatial axis ``A^T``, of shape [pixels of y, 4 tiles].
        kernel: ``G (x) G``, of shape [16, 9].
    """

    inputs: tuple[Matrix, Matrix]
    outputs: tuple[Matrix, Matrix]
    kernel: Matrix


def fits(
    dtype: ir.DataType | None,
    kernel: Sequence[int | None],
    batch: int | None,
    window: Sequence[int | None],
    padding: Sequence[int],
    others: Sequence[int],
) -> bool:
    """Whether a convolution can be, and is faster, written this way.

    Args:
        dtype: Of the images. In float64 exactness comes first: there products of patches stay.
        kernel: Sizes of the weight, [O, C, 3, 3].
        batch: Images, None if symbolic (then they are taken to be many).
        window: Spatial sizes of the input.
        padding: On each side.
        others: Strides, dilations and groups: all have to be 1.
    """
    if dtype != ir.DataType.FLOAT or list(kernel[2:]) != [3, 3] or set(others) != {1}:
        return False
    channels = [size for size in kernel[:2] if size is not None]
    known = [size for size in window if size is not None]
    if len(channels) < 2 or len(known) < 2:
        return False
    grid = [s + 2 * p - 2 for s, p in zip(known, padding, strict=True)]
    longest = max(*known, *grid)
    rows = None if batch is None else prod(-(-g // 2) for g in grid) * batch
    return (
        longest <= _LARGEST
        and min(channels) >= _CHANNELS_PER_PIXEL * longest
        and (rows is None or rows >= _ROWS)
    )


def maps(window: Sequence[int], padding: Sequence[int]) -> Maps:
    """The matrices for an image of the spatial sizes ``window`` (see `Maps`).

    Args:
        window: Spatial sizes of the input.
        padding: On each side.
    """
    inputs, outputs = [], []
    for pixels, pad in zip(window, padding, strict=True):
        grid = pixels + 2 * pad - 2
        tiles = -(-grid // 2)
        into, out = np.zeros((4, tiles, pixels)), np.zeros((grid, 4, tiles))
        for tile in range(tiles):
            for tap in range(4):
                if 0 <= (pixel := 2 * tile - pad + tap) < pixels:
                    into[:, tile, pixel] = _B[:, tap]
            for row in range(min(2, grid - 2 * tile)):
                out[2 * tile + row, :, tile] = _A[row]
        inputs.append(into.reshape(4 * tiles, pixels))
        outputs.append(out.reshape(grid, 4 * tiles))
    return Maps((inputs[0], inputs[1]), (outputs[0], outputs[1]), np.kron(_G, _G))


def convolution(x: ir.Value, w: ir.Value, window: Sequence[int], padding: Sequence[int]) -> Any:
    """``y`` of the module's formulas, without bias."""
    given = maps(window, padding)
    out_channels, channels = _channels(w)
    spread = _spread(x, given.inputs, channels)
    kernel = op.Transpose(_kernel(w, given), perm=[0, 1, 2, 4, 3])
    return _image(op.MatMul(spread, kernel), given.outputs, out_channels)


def input_gradient(dy: ir.Value, w: ir.Value, window: Sequence[int], padding: Sequence[int]) -> Any:
    """``dx`` of the module's formulas."""
    given = maps(window, padding)
    out_channels, channels = _channels(w)
    spread = _spread(dy, (given.outputs[0].T, given.outputs[1].T), out_channels)
    product = op.MatMul(spread, _kernel(w, given))
    return _image(product, (given.inputs[0].T, given.inputs[1].T), channels)


def _spread(image: ir.Value, matrices: Sequence[Matrix], channels: int) -> Any:
    """``[N, C, H, W]``, multiplied along its axes, as ``[4, T, 4, U N, C]``.

    That is, a matrix for each position and row of tiles.
    """
    (tall, height), (_, width) = (matrix.shape for matrix in matrices)
    # As a matrix of two axes: ONNX Runtime turns [N, C, H, W] to [H, W, N, C] three times slower.
    turned = op.Transpose(op.Reshape(image, ints(-1, height * width)), perm=[1, 0])
    value = op.MatMul(_constant(matrices[0]), op.Reshape(turned, ints(height, -1)))
    value = op.MatMul(_constant(matrices[1]), op.Reshape(value, ints(tall, width, -1)))
    return op.Reshape(value, ints(4, tall // 4, 4, -1, channels))


def _image(product: Any, matrices: Sequence[Matrix], channels: int) -> Any:
    """``[4, T, 4, U N, C]``, multiplied along the axes of tiles, as ``[N, C, H, W]``."""
    (height, rows), (width, columns) = (matrix.shape for matrix in matrices)
    value = op.Reshape(product, ints(rows, columns, -1))
    value = op.MatMul(_constant(matrices[1]), value)
    value = op.MatMul(_constant(matrices[0]), op.Reshape(value, ints(rows, -1)))
    value = op.Transpose(op.Reshape(value, ints(height * width, -1)), perm=[1, 0])
    return op.Reshape(value, ints(-1, channels, height, width))


def _kernel(w: ir.Value, given: Maps) -> Any:
    """``u`` as ``[4, 1, 4, O, C]``, to be multiplied with what `_spread` returns."""
    out_channels, channels = _channels(w)
    taps = op.Transpose(op.Reshape(w, ints(-1, 9)), perm=[1, 0])
    u = op.MatMul(_constant(given.kernel), taps)
    return op.Reshape(u, ints(4, 1, 4, out_channels, channels))


def _channels(w: ir.Value) -> tuple[int, int]:
    out_channels, channels, *_ = sizes(w)
    assert out_channels is not None
    assert channels is not None
    return out_channels, channels


def _constant(matrix: Matrix) -> Any:
    return op.Constant(value=ir.tensor(np.ascontiguousarray(matrix, np.float32)))
