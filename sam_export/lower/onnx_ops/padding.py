"""Padding with the pixel at the edge, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch import Tensor

from sam_export.lower.onnx_ops.table import decomposition, ints, lowering, sizes, static


@lowering("aten::replication_pad1d")
@lowering("aten::replication_pad2d")
@lowering("aten::replication_pad3d")
def replication_pad(x: ir.Value, padding: Sequence[int]) -> Any:
    """aten::replication_pad2d(Tensor self, SymInt[4] padding) -> Tensor; and in 1d and 3d.

    ``Pad``; a negative padding cuts pixels away *after* the edge was repeated, which ``Pad`` does
    not do, so there each axis is gathered from the pixels that it shows.
    """
    count, rank = len(padding) // 2, len(sizes(x))
    if all(size >= 0 for size in padding):
        before = [*[0] * (rank - count), *reversed(padding[::2])]
        after = [*[0] * (rank - count), *reversed(padding[1::2])]
        return op.Pad(x, ints(*before, *after), mode="edge")
    image = static("An image that is cut", sizes(x)[rank - count :])
    for place in range(count):
        axis, size = rank - 1 - place, image[-1 - place]
        start, end = padding[2 * place], padding[2 * place + 1]
        source = np.clip(np.arange(size + start + end) - start, 0, size - 1)
        x = op.Gather(x, op.Constant(value=ir.tensor(source)), axis=axis)
    return x


@decomposition("aten::replication_pad1d_backward")
@decomposition("aten::replication_pad2d_backward")
@decomposition("aten::replication_pad3d_backward")
def replication_pad_backward(grad: Tensor, x: Tensor, padding: Sequence[int]) -> Tensor:
    """aten::replication_pad2d_backward(Tensor grad_output, Tensor self, SymInt[4] padding) ->
    Tensor; and in 1d and 3d.

    Along each axis, output pixel ``o`` is input pixel ``o - before``, cut off to the image; a
    negative padding cuts pixels away, and these get nothing.
    """
    for place in range(len(padding) // 2):
        dim = x.dim() - 1 - place
        size, before = x.shape[dim], padding[2 * place]
        source = torch.arange(grad.shape[dim], device=grad.device) - before
        shape = [*grad.shape]
        shape[dim] = size
        grad = grad.new_zeros(shape).index_add(dim, source.clamp(0, size - 1), grad)
    return grad
