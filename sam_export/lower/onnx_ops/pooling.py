"""Max pooling and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

from sam_export.lower.onnx_ops.table import ints, lowering, per_axis, scalar, sizes, static

_SMALL_IMAGE = 64
"""Up to this many output pixels pooling without indices is the faster form.

``MaxPool`` with indices takes ONNX Runtime's CPU ten times as long as without (0.19 against 0.02 ms
for 64 images of 64 channels and 4x4 pixels), and ``ScatterElements`` as long again.
"""


def _batched(spatial: int, form: Callable[..., Any]) -> Callable[..., Any]:
    """``form`` for images of so many axes, of one example too: that is a batch of one."""

    def batched(*arguments: Any, **named: Any) -> Any:
        first = next(value for value in arguments if isinstance(value, ir.Value))
        if len(sizes(first)) == spatial + 2:
            return form(spatial, *arguments, **named)
        values = [_of_one(v) if isinstance(v, ir.Value) else v for v in arguments]
        named = {k: _of_one(v) if isinstance(v, ir.Value) else v for k, v in named.items()}
        results = form(spatial, *values, **named)
        if isinstance(results, tuple):
            return tuple(op.Squeeze(result, ints(0)) for result in results)
        return op.Squeeze(results, ints(0))

    return batched


def _of_one(value: ir.Value) -> ir.Value:
    batch: ir.Value = op.Unsqueeze(value, ints(0))
    assert value.shape is not None
    batch.dtype, batch.shape = value.dtype, ir.Shape([1, *value.shape])
    return batch


def max_pool(
    spatial: int,
    x: ir.Value,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Any:
    """aten::max_pool2d_with_indices(Tensor self, int[2] kernel_size, int[2] stride=[], int[2]
    padding=0, int[2] dilation=1, bool ceil_mode=False) -> (Tensor, Tensor); and in 3d.

    ONNX's index is flat over the whole tensor, torch's is flat within an image of one channel: the
    rest of a division by that image's size. `max_pool_backward` looks behind the division, which
    then is dead.
    """
    image = sizes(x)[-spatial:]
    kernel = per_axis(kernel_size, len(image))
    y, flat = op.MaxPool(
        x,
        kernel_shape=kernel,
        strides=per_axis(stride, len(image)) if stride else kernel,
        pads=per_axis(padding, len(image)) * 2,
        dilations=per_axis(dilation, len(image)),
        ceil_mode=int(ceil_mode),
    )
    # The largest of ties: torch takes the first in row-major order, and so does ONNX Runtime.
    return y, op.Mod(flat, ints(prod(static("An image that is pooled", image))))


def max_pool_backward(
    spatial: int,
    dy: ir.Value,
    x: ir.Value,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: ir.Value,
) -> Any:
    """aten::max_pool2d_with_indices_backward(Tensor grad_output, Tensor self, int[2] kernel_size,
    int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode, Tensor indices) -> Tensor;
    and in 3d.

    ``dx[indices] += dy``, over the flat tensor. Windows that do not overlap hit each input once.
    Where windows tile a small image, no index is needed (`_tiled`).
    """
    kernel = per_axis(kernel_size, spatial)
    strides = per_axis(stride, spatial) if stride else kernel
    dilation = per_axis(dilation, spatial)
    grid = _tiles(x, kernel, strides, padding, dilation, ceil_mode)
    if grid is not None:
        return _tiled(dy, x, kernel, grid)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    disjoint = all(s > r for s, r in zip(strides, reach, strict=True))
    whole = _undivided(indices)
    if whole is None:
        return _scattered(spatial, dy, x, indices)
    zeros = op.Expand(scalar(0.0, dy), op.Reshape(op.Size(x), ints(1)))
    flat = op.ScatterElements(
        zeros,
        op.Reshape(whole, ints(-1)),
        op.Reshape(dy, ints(-1)),
        axis=0,
        **({} if disjoint else {"reduction": "add"}),
    )
    return op.Reshape(flat, op.Shape(x))


def flat_indices(
    dy: ir.Value,
    x: ir.Value,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: ir.Value,
) -> ir.Value | None:
    """The indices over the whole tensor by which ``dx`` of a pooling in 2d is ``dy`` scattered.

    None where it is not: windows tile a small image, the images are one example, or the indices
    come from elsewhere.
    """
    if len(sizes(dy)) != 4:
        return None
    kernel = per_axis(kernel_size, 2)
    strides = per_axis(stride, 2) if stride else kernel
    if _tiles(x, kernel, strides, padding, per_axis(dilation, 2), ceil_mode) is not None:
        return None
    return _undivided(indices)


def _undivided(indices: ir.Value) -> ir.Value | None:
    """What `max_pool` divided to get torch's indices from."""
    division = indices.producer()
    return None if division is None or division.op_type != "Mod" else division.inputs[0]


def _tiles(
    x: ir.Value,
    kernel: list[int],
    strides: list[int],
    padding: Sequence[int],
    dilation: list[int],
    ceil_mode: bool,
) -> list[int] | None:
    """How many windows tile a small image along each axis; None where they do not."""
    image = sizes(x)[-len(kernel) :]
    if strides != kernel or any(padding) or len(kernel) != 2 or ceil_mode:
        return None
    if set(dilation) != {1} or None in image:
        return None
    known = static("An image", image)
    grid = [s // k for s, k in zip(known, kernel, strict=True)]
    whole = all(s % k == 0 for s, k in zip(known, kernel, strict=True))
    return grid if whole and prod(grid) <= _SMALL_IMAGE else None


def adaptive_max_pool_backward(spatial: int, dy: ir.Value, x: ir.Value, indices: ir.Value) -> Any:
    """aten::adaptive_max_pool2d_backward(Tensor grad_output, Tensor self, Tensor indices) -> Tensor

    ``dx[indices] += dy`` within each image of one channel.
    """
    return _scattered(spatial, dy, x, indices)


for _n in (2, 3):
    lowering(f"aten::max_pool{_n}d_with_indices")(_batched(_n, max_pool))
    lowering(f"aten::max_pool{_n}d_with_indices_backward")(_batched(_n, max_pool_backward))
    lowering(f"aten::adaptive_max_pool{_n}d_backward")(_batched(_n, adaptive_max_pool_backward))


def _scattered(spatial: int, dy: ir.Value, x: ir.Value, indices: ir.Value) -> Any:
    """``dx[indices] += dy`` within each image, with torch's own indices."""
    pixels = prod(static("An image that is pooled", sizes(x)[-spatial:]))
    pooled = prod(static("An image that is pooled", sizes(dy)[-spatial:]))
    zeros = op.Expand(scalar(0.0, dy), op.Shape(op.Reshape(x, ints(-1, pixels))))
    flat = op.ScatterElements(
        zeros,
        op.Reshape(indices, ints(-1, pooled)),
        op.Reshape(dy, ints(-1, pooled)),
        axis=1,
        reduction="add",
    )
    return op.Reshape(flat, op.Shape(x))


def _tiled(dy: ir.Value, x: ir.Value, kernel: list[int], grid: list[int]) -> Any:
    """Windows that tile the image: ``dx = dy`` at the first maximum of each window, else 0.

    Channels first and batch last, so that each offset within the windows is a slice of long runs,
    and everything is element by element over these slices. PyTorch takes the first maximum in
    row-major order, which matters for ties (several zeros behind a ReLU).
    """
    channels = static("The channels of a pooling", sizes(x)[1:2])[0]
    image = op.Transpose(x, perm=[1, 2, 3, 0])
    gradient = op.Transpose(dy, perm=[1, 2, 3, 0])
    (rows, columns), axes = kernel, ints(1, 2)
    offsets = [(i, j) for i in range(rows) for j in range(columns)]
    ends = [(i + (grid[0] - 1) * rows + 1, j + (grid[1] - 1) * columns + 1) for i, j in offsets]
    slices = [
        op.Slice(image, ints(*start), ints(*end), axes, ints(rows, columns))
        for start, end in zip(offsets, ends, strict=True)
    ]
    largest = op.Max(*slices) if len(slices) > 1 else slices[0]
    taken = None
    parts = []
    for slice_ in slices:
        equal = op.Equal(slice_, largest)
        first = equal if taken is None else op.And(equal, op.Not(taken))
        taken = equal if taken is None else op.Or(taken, equal)
        parts.append(op.Mul(gradient, op.CastLike(first, dy)))
    lines = []
    for i in range(rows):
        line = [op.Unsqueeze(part, ints(3)) for part in parts[i * columns : (i + 1) * columns]]
        joined = op.Concat(*line, axis=3) if columns > 1 else line[0]
        lines.append(op.Reshape(joined, ints(channels, grid[0], 1, grid[1] * columns, -1)))
    joined = op.Concat(*lines, axis=2) if rows > 1 else lines[0]
    whole = op.Reshape(joined, ints(channels, grid[0] * rows, grid[1] * columns, -1))
    return op.Transpose(whole, perm=[3, 0, 1, 2])
