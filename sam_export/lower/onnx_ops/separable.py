"""Average pooling and interpolation, and their gradients: a matrix along each spatial axis.

Both are linear, and the same along each axis on its own, so with a constant matrix ``A_d`` of shape
``[output size, input size]`` for every spatial axis ``d``::

    y  = x multiplied along each axis d by A_d
    dx = dy multiplied along each axis d by the transpose of A_d

A row of ``A_d`` holds the weights of one output pixel. This is exact in every dtype that has a
``MatMul``, for every option: ONNX's own ``AveragePool`` and ``Resize`` are float32 only on ONNX
Runtime's CPU, have no gradients, and round window ends and coordinates in ways of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnxscript import opset18 as op

from sam_export.lower.onnx_ops.table import ints, lowering, numpy_dtype, per_axis, sizes, static

Matrix = NDArray[np.float64]


def _apply(x: ir.Value, matrices: Sequence[Matrix]) -> Any:
    """``x[*, *S]`` multiplied by a matrix along each of its last axes."""
    shape: list[int | None] = sizes(x)
    spatial = len(matrices)
    rows = static("An image that is pooled or resized", shape[-spatial:])
    kind, result = numpy_dtype(x), x
    for axis, matrix in enumerate(matrices):
        if matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(len(matrix))):
            continue
        after = rows[axis + 1 :]
        if after:
            # Axes behind this one become columns, so that one product does them all.
            result = op.Reshape(result, ints(-1, rows[axis], prod(after)))
            result = op.MatMul(op.Constant(value=ir.tensor(matrix.astype(kind))), result)
        else:
            turned = np.ascontiguousarray(matrix.T.astype(kind))
            result = op.Reshape(result, ints(-1, rows[axis]))
            result = op.MatMul(result, op.Constant(value=ir.tensor(turned)))
        rows[axis] = matrix.shape[0]
    if result is x:
        return op.Identity(x)
    lead = len(shape) - spatial
    symbolic = [axis for axis in range(lead) if shape[axis] is None]
    if len(symbolic) <= 1:
        target = [-1 if size is None else size for size in shape[:lead]]
        return op.Reshape(result, ints(*target, *rows))
    kept = op.Shape(x, start=0, end=lead)
    return op.Reshape(result, op.Concat(kept, ints(*rows), axis=0))


def _transposed(matrices: Sequence[Matrix]) -> list[Matrix]:
    return [matrix.T for matrix in matrices]


# -- average pooling ------------------------------------------------------------------------------


def _averages(
    size: int, kernel: int, stride: int, padding: int, ceil_mode: bool, divide: str
) -> Matrix:
    """Weights of pooling along one axis.

    Args:
        size: Of the input.
        kernel: Of the window.
        stride: Of the window.
        padding: Zeros on each side.
        ceil_mode: Whether a last window that starts inside, but ends outside, counts.
        divide: By what: "padded", the window's size with padding; "real", without; "" by nothing.
    """
    over = size + 2 * padding - kernel
    count = (over + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1  # it would start in the padding behind the image
    matrix = np.zeros((count, size))
    for row in range(count):
        start = row * stride - padding
        end = min(start + kernel, size + padding)
        first, last = max(start, 0), min(end, size)
        by = {"padded": end - start, "real": last - first, "": 1}[divide]
        matrix[row, first:last] = 1.0 / by
    return matrix


def _pooling(
    image: Sequence[int | None],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> list[Matrix]:
    spatial = len(image)
    known = static("An image that is pooled", image)
    kernel = per_axis(kernel_size, spatial)
    divide = "" if divisor_override else "padded" if count_include_pad else "real"
    matrices = [
        _averages(*axis, ceil_mode, divide)
        for axis in zip(
            known,
            kernel,
            per_axis(stride, spatial) if stride else kernel,
            per_axis(padding, spatial),
            strict=True,
        )
    ]
    if divisor_override:
        matrices[0] /= divisor_override
    return matrices


def _avg_pool(spatial: int) -> Callable[..., Any]:
    def form(
        x: ir.Value,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        image = sizes(x)[-spatial:]
        options = (stride, padding, ceil_mode, count_include_pad, divisor_override)
        return _apply(x, _pooling(image, kernel_size, *options))

    return form


def _avg_pool_backward(spatial: int) -> Callable[..., Any]:
    def form(dy: ir.Value, x: ir.Value, kernel_size: Sequence[int], *options: Any) -> Any:
        return _apply(dy, _transposed(_pooling(sizes(x)[-spatial:], kernel_size, *options)))

    return form


# aten::avg_pool2d(Tensor self, int[2] kernel_size, int[2] stride=[], int[2] padding=0,
#   bool ceil_mode=False, bool count_include_pad=True, int? divisor_override=None) -> Tensor
# aten::avg_pool2d_backward(Tensor grad_output, Tensor self, int[2] kernel_size, int[2] stride,
#   int[2] padding, bool ceil_mode, bool count_include_pad, int? divisor_override) -> Tensor
# and the same in three dimensions. (avg_pool1d is written as two.)
for _n in (2, 3):
    lowering(f"aten::avg_pool{_n}d")(_avg_pool(_n))
    lowering(f"aten::avg_pool{_n}d_backward")(_avg_pool_backward(_n))


def _adaptive(image: Sequence[int | None], output_size: Sequence[int]) -> list[Matrix]:
    """Window ``i`` of ``m`` over ``n`` pixels, from ``floor(i n / m)`` to ``ceil((i+1) n / m)``."""
    matrices = []
    for size, count in zip(static("An image that is pooled", image), output_size, strict=True):
        matrix = np.zeros((count, size))
        for row in range(count):
            start, end = row * size // count, -(-(row + 1) * size // count)
            matrix[row, start:end] = 1.0 / (end - start)
        matrices.append(matrix)
    return matrices


def _adaptive_avg_pool(x: ir.Value, output_size: Sequence[int]) -> Any:
    return _apply(x, _adaptive(sizes(x)[-len(output_size) :], output_size))


def _adaptive_avg_pool_backward(spatial: int) -> Callable[..., Any]:
    def form(dy: ir.Value, x: ir.Value) -> Any:
        counts = static("A pooled image", sizes(dy)[-spatial:])
        return _apply(dy, _transposed(_adaptive(sizes(x)[-spatial:], counts)))

    return form


# aten::_adaptive_avg_pool2d(Tensor self, SymInt[2] output_size) -> Tensor
# aten::_adaptive_avg_pool2d_backward(Tensor grad_output, Tensor self) -> Tensor, and in 3d.
for _n in (2, 3):
    lowering(f"aten::_adaptive_avg_pool{_n}d")(_adaptive_avg_pool)
    lowering(f"aten::_adaptive_avg_pool{_n}d_backward")(_adaptive_avg_pool_backward(_n))


# -- interpolation --------------------------------------------------------------------------------


def _weights(mode: str, size: int, count: int, align: bool | None, scale: float | None) -> Matrix:
    """Weights of interpolation along one axis: the operator itself on the unit vectors."""
    x = torch.eye(size, dtype=torch.float64)[None]
    aten = torch.ops.aten
    if mode in ("nearest", "nearest-exact"):
        name = "upsample_nearest1d" if mode == "nearest" else "_upsample_nearest_exact1d"
        y = getattr(aten, name)(x, [count], scale)
    elif mode == "linear":
        y = aten.upsample_linear1d(x, [count], align, scale)
    else:  # cubic: of a plane whose other axis stays as it is
        name = {
            "cubic": "upsample_bicubic2d",
            "linear-aa": "_upsample_bilinear2d_aa",
            "cubic-aa": "_upsample_bicubic2d_aa",
        }[mode]
        y = getattr(aten, name)(x[None], [size, count], align, 1.0, scale)[0]
    matrix: Matrix = y[0].T.numpy()
    return matrix


def _interpolation(
    mode: str,
    image: Sequence[int | None],
    output_size: Sequence[int],
    align: bool | None,
    scales: Sequence[float | None],
) -> list[Matrix]:
    known = static("An image that is resized", image)
    scales = list(scales) or [None] * len(known)
    return [
        _weights(mode, size, count, align, scale)
        for size, count, scale in zip(known, output_size, scales, strict=True)
    ]


def _upsample(mode: str, aligns: bool) -> Callable[..., Any]:
    def form(x: ir.Value, output_size: Sequence[int], *options: Any, **named: Any) -> Any:
        align, scales = _options(aligns, options, named)
        image = sizes(x)[2:]
        return _apply(x, _interpolation(mode, image, output_size, align, scales))

    return form


def _upsample_backward(mode: str, aligns: bool) -> Callable[..., Any]:
    def form(
        dy: ir.Value, output_size: Sequence[int], input_size: Sequence[Any], *options: Any, **n: Any
    ) -> Any:
        align, scales = _options(aligns, options, n)
        image = [size if isinstance(size, int) else None for size in input_size[2:]]
        return _apply(dy, _transposed(_interpolation(mode, image, output_size, align, scales)))

    return form


def _options(
    aligns: bool, options: Sequence[Any], named: dict[str, Any]
) -> tuple[bool | None, list[float | None]]:
    values = [*options, *named.values()]
    return (bool(values[0]), values[1:]) if aligns else (None, values)


# aten::upsample_bilinear2d(Tensor self, SymInt[2] output_size, bool align_corners,
#   float? scales_h=None, float? scales_w=None) -> Tensor
# aten::upsample_bilinear2d_backward(Tensor grad_output, SymInt[2] output_size,
#   SymInt[4] input_size, bool align_corners, float? scales_h=None, float? scales_w=None) -> Tensor
# and kin; "nearest" ones have no align_corners.
for _name, _mode, _aligns in (
    *((f"upsample_nearest{n}d", "nearest", False) for n in (1, 2, 3)),
    *((f"_upsample_nearest_exact{n}d", "nearest-exact", False) for n in (1, 2, 3)),
    ("upsample_linear1d", "linear", True),
    ("upsample_bilinear2d", "linear", True),
    ("upsample_trilinear3d", "linear", True),
    ("upsample_bicubic2d", "cubic", True),
    ("_upsample_bilinear2d_aa", "linear-aa", True),
    ("_upsample_bicubic2d_aa", "cubic-aa", True),
):
    lowering(f"aten::{_name}")(_upsample(_mode, _aligns))
    lowering(f"aten::{_name}_backward")(_upsample_backward(_mode, _aligns))
