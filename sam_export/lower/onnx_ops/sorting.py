"""Sorting."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

from sam_export.lower.onnx_ops.table import ints, lowering


@lowering("aten::sort.stable")
def sort(
    x: ir.Value, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Any, Any]:
    """aten::sort.stable(Tensor self, *, bool? stable, int dim=-1, bool descending=False)
    -> (Tensor values, Tensor indices)

    ``TopK`` of all elements; of equal ones it puts the lower index first, so it is stable.
    """
    count = op.Gather(op.Shape(x), ints(dim), axis=0)
    values, indices = op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)
    return values, indices
