"""Views, and what their gradients write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch import Tensor

from sam_export.lower.onnx_ops.table import decomposition, ints, lowering, sizes


@lowering("aten::squeeze.dim")
@lowering("aten::squeeze.dims")
def squeeze(x: ir.Value, dim: int | Sequence[int]) -> Any:
    """aten::squeeze.dims(Tensor(a) self, int[] dim) -> Tensor(a)

    Without the dimensions of size 1 among ``dim``; the others stay, where ``Squeeze`` fails.
    """
    shape = sizes(x)
    given = [dim] if isinstance(dim, int) else list(dim)
    dropped = [d % len(shape) for d in given] if shape else []
    dropped = [d for d in dropped if shape[d] == 1]
    return op.Squeeze(x, ints(*dropped)) if dropped else op.Identity(x)


@lowering("prims::view_of")
def view_of(x: ir.Value) -> Any:
    """prims::view_of(Tensor(a) a) -> Tensor(a)"""
    return op.Identity(x)


@decomposition("aten::unfold_backward")
def unfold_backward(
    grad: Tensor, input_sizes: Sequence[int], dim: int, size: int, step: int
) -> Tensor:
    """aten::unfold_backward(Tensor grad_in, SymInt[] input_sizes, int dim, int size, int step) ->
    Tensor

    Element ``j`` of window ``i`` is element ``i * step + j`` of the input, whose gradient is the
    sum over the windows that show it.
    """
    if not input_sizes:
        return grad.reshape(())
    dim = dim % len(input_sizes)
    windows = grad.shape[dim]
    places = torch.arange(windows, device=grad.device).unsqueeze(1) * step
    places = places + torch.arange(size, device=grad.device)
    joined = grad.movedim(-1, dim + 1).flatten(dim, dim + 1)
    return grad.new_zeros(input_sizes).index_add(dim, places.reshape(-1), joined)
