"""The table of ATen operators that ``onnx-training`` writes otherwise than ``onnx``.

An entry is one function with ``@training_form("aten::name.overload")`` in a file of this folder. It
gets what the portable form gets, and calls `portable` for what the training operator cannot take
or does not do faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from sam_export._compat import onnx_nodes
from sam_export._compat.onnx_exporter import decomposition_of
from sam_export.lower.onnx_ops import PORTABLE
from sam_export.lower.onnx_ops.table import Tables, overload
from sam_export.lower.onnx_training_nodes import TRAINING_DOMAIN

TRAINING_FORMS: dict[Any, Callable[..., Any]] = {}
"""Operator overload to the function that writes it with training operators."""

KEPT_WHOLE: dict[Any, Callable[..., Any]] = {}
"""Operator overload to whether its training form takes these arguments.

For operators that the portable table takes apart: they are taken apart here too where the answer is
no.
"""


def training_form(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the training form of the ATen operator ``aten::name.overload``."""
    target = overload(schema)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if target in TRAINING_FORMS:
            raise ValueError(f"{schema} has a form already: {TRAINING_FORMS[target].__name__}.")
        TRAINING_FORMS[target] = function
        return function

    return register


def kept_whole(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers when the portable table's decomposition of an operator gives way to our form."""
    target = overload(schema)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        KEPT_WHOLE[target] = function
        return function

    return register


def portable(schema: str) -> Callable[..., Any]:
    """The form in standard operators."""
    return PORTABLE.forms[overload(schema)]


def training_tables() -> Tables:
    """The portable table with all that is registered here put over it."""
    own = {target: _unless(target, takes) for target, takes in KEPT_WHOLE.items()}
    return Tables(
        forms={**PORTABLE.forms, **TRAINING_FORMS},
        decomposed=[target for target in PORTABLE.decomposed if target not in own],
        own_decompositions={**PORTABLE.own_decompositions, **own},
    )


def _unless(target: Any, takes: Callable[..., bool]) -> Callable[..., Any]:
    apart = PORTABLE.own_decompositions.get(target) or decomposition_of(target)

    def decompose(*arguments: Any, **named: Any) -> Any:
        return NotImplemented if takes(*arguments, **named) else apart(*arguments, **named)

    return decompose


def training_op(
    name: str,
    inputs: Sequence[ir.Value | None],
    results: Sequence[ir.Value | None],
    **attributes: Any,
) -> list[ir.Value]:
    """One node of `TRAINING_DOMAIN`.

    Args:
        name: Of the operator.
        inputs: Its inputs.
        results: For each output a value of the same dtype and shape, or None for one that nobody
            reads. ONNX cannot infer what these operators return, and some crash without it.
        **attributes: Its attributes.
    """
    outputs = onnx_nodes.node(TRAINING_DOMAIN, name, *inputs, count=len(results), **attributes)
    for output, like in zip(outputs, results, strict=True):
        if like is not None:
            output.dtype, output.shape = like.dtype, like.shape
    return list(outputs)
