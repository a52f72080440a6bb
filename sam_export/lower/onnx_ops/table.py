"""The table of ATen operators that have an ONNX form of our own.

Adding one is one function with ``@lowering("aten::name.overload")`` in a file of this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18 as op

from sam_export.errors import LoweringError

Function = TypeVar("Function", bound=Callable[..., Any])

FORMS: dict[Any, Callable[..., Any]] = {}
"""Operator overload to the function that writes its ONNX form."""

DECOMPOSED: list[Any] = [
    # Exact in torch's own decompositions; the exporter's translations of these are wrong (the
    # total weight of nll_loss_forward, mv, addmv) or missing.
    torch.ops.aten.nll_loss_forward.default,
    torch.ops.aten.nll_loss2d_forward.default,
    torch.ops.aten.nll_loss_backward.default,
    torch.ops.aten.nll_loss2d_backward.default,
    torch.ops.aten._log_softmax_backward_data.default,
    torch.ops.aten._softmax_backward_data.default,
    torch.ops.aten.native_group_norm_backward.default,
    torch.ops.aten.max_unpool2d.default,
    torch.ops.aten.max_unpool3d.default,
    torch.ops.aten.mv.default,
    torch.ops.aten.addmv.default,
    # Into products and sums with Python numbers, which `arithmetic` writes at full precision.
    torch.ops.aten.addcmul.default,
    torch.ops.aten.addcdiv.default,
]
"""Operators that torch's decompositions turn into simpler ones before the ONNX form is made."""


OWN_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""Operator overload to a function that computes it in simpler operators, as torch tensors."""


@dataclass(frozen=True)
class Tables:
    """What `onnx_graph.onnx_model` writes operators with.

    Attributes:
        forms: Operator overload to the function that writes its ONNX form.
        decomposed: Operators that torch's decompositions take apart before that.
        own_decompositions: Operator overload to our own decomposition of it.
        has_float16: Whether the device computes in float16. Otherwise a float16 graph is written in
            float32, with the roundings (`float16_rounding`).
    """

    forms: Mapping[Any, Callable[..., Any]]
    decomposed: Sequence[Any]
    own_decompositions: Mapping[Any, Callable[..., Any]]
    has_float16: bool = False


PORTABLE = Tables(FORMS, DECOMPOSED, OWN_DECOMPOSITIONS)
"""Standard operators only; filled when `sam_export.lower.onnx_ops` is imported."""


def decomposition(schema: str) -> Callable[[Function], Function]:
    """Registers a function that computes ``aten::name.overload`` in simpler operators.

    The function gets and returns tensors. Torch's own decomposition, where there is one, gives way.
    """
    target = overload(schema)

    def register(function: Function) -> Function:
        if target in OWN_DECOMPOSITIONS:
            raise ValueError(f"{schema} has a decomposition already.")
        OWN_DECOMPOSITIONS[target] = function
        return function

    return register


def lowering(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the ONNX form of the ATen operator ``aten::name.overload``.

    The function gets the operator's arguments: ONNX values for tensors, Python values otherwise.
    """
    target = overload(schema)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if target in FORMS:
            raise ValueError(f"{schema} has an ONNX form already: {FORMS[target].__name__}.")
        FORMS[target] = function
        return function

    return register


def overload(schema: str) -> Any:
    """The operator ``aten::name.overload``."""
    namespace, _, rest = schema.partition("::")
    name, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")


def ints(*values: int) -> Any:
    """A constant int64 vector."""
    return op.Constant(value=ir.tensor(np.array(values, np.int64)))


def scalar(value: float, like: ir.Value) -> Any:
    """A constant of the dtype of ``like``, rounded once, from the Python number."""
    return op.Constant(value=ir.tensor(np.array(value, numpy_dtype(like))))


def full(size: int, value: float, like: ir.Value) -> Any:
    """A constant vector of the dtype of ``like``."""
    return op.Constant(value=ir.tensor(np.full(size, value, numpy_dtype(like))))


def numpy_dtype(value: ir.Value) -> np.dtype[Any]:
    """NumPy's dtype of an ONNX value."""
    assert value.dtype is not None
    dtype: np.dtype[Any] = np.dtype(value.dtype.numpy())
    return dtype


def sizes(value: ir.Value) -> list[int | None]:
    """Sizes of a value; None where symbolic."""
    assert value.shape is not None
    return [size if isinstance(size, int) else None for size in value.shape]


def static(what: str, values: Sequence[int | None]) -> list[int]:
    """``values``, all of which must be known.

    Raises:
        LoweringError: One is symbolic.
    """
    if any(value is None for value in values):
        raise LoweringError(
            f"{what} must have fixed sizes for ONNX; found {list(values)} (None is symbolic). "
            "Capture with only the batch dimension dynamic."
        )
    return [int(value) for value in values if value is not None]


def per_axis(values: Sequence[int], spatial: int) -> list[int]:
    """An option of a window for each spatial axis; ATen gives one number for all."""
    return list(values) * spatial if len(values) == 1 else list(values)
