"""ONNX forms of ATen operators: importing this package fills `table.FORMS`."""

from sam_export.lower.onnx_ops import (
    activation,
    arithmetic,
    batch_norm,
    convolution,
    division,
    error_function,
    layer_norm,
    pooling,
    sorting,
)
from sam_export.lower.onnx_ops.table import DECOMPOSED, FORMS

__all__ = [
    "DECOMPOSED",
    "FORMS",
    "activation",
    "arithmetic",
    "batch_norm",
    "convolution",
    "division",
    "error_function",
    "layer_norm",
    "pooling",
    "sorting",
]
