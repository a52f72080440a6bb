"""ONNX forms of ATen operators: importing this package fills `table.FORMS`."""

from sam_export.lower.onnx_ops import (
    activation,
    arithmetic,
    batch_norm,
    convolution,
    decompositions,
    division,
    error_function,
    layer_norm,
    pooling,
    separable,
    softmax,
    sorting,
)
from sam_export.lower.onnx_ops.table import DECOMPOSED, FORMS, OWN_DECOMPOSITIONS

__all__ = [
    "DECOMPOSED",
    "FORMS",
    "OWN_DECOMPOSITIONS",
    "activation",
    "arithmetic",
    "batch_norm",
    "convolution",
    "decompositions",
    "division",
    "error_function",
    "layer_norm",
    "pooling",
    "separable",
    "softmax",
    "sorting",
]
