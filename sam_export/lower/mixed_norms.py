"""Normalizations of mixed dtypes, written as ATen computes them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from sam_export._compat.program import inserted, renewed, returning

_aten = torch.ops.aten

_NARROW = (torch.float16, torch.bfloat16)

WEIGHT = {
    _aten._native_batch_norm_legit_functional.default: 1,
    _aten._native_batch_norm_legit_no_training.default: 1,
    _aten.native_batch_norm_backward.default: 2,
    _aten.native_layer_norm.default: 2,
    _aten.native_layer_norm_backward.default: 5,
    _aten.native_group_norm.default: 1,
    _aten.native_group_norm_backward.default: 4,
}
"""Operator to the place of its weight."""


def norms_in_float32(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """``program`` with normalizations of a narrow input by float32 weights in float32.

    Under autocast the input of a normalization is float16 or bfloat16 and its weights are float32.
    ATen's kernels compute in float32 then, round the result, and keep mean and deviation of the
    batch in float32 for the backward pass. Their shapes and decompositions round these two to the
    input's dtype: the gradient of BatchNorm's input then has a mean, which a bias before it sees.
    """
    if not any(map(_is_mixed, program.graph.nodes)):
        return program
    return returning(program, _rewritten)


def _rewritten(
    graph: fx.Graph, inputs: Sequence[fx.Node], results: Sequence[fx.Node]
) -> Sequence[fx.Node]:
    for node in filter(_is_mixed, list(graph.nodes)):
        parts = [user for user in node.users if user.target is operator.getitem]
        dtypes = {part: part.meta["val"].dtype for part in parts}
        for argument in node.all_input_nodes:
            if _is_narrow(argument):
                wide = inserted(graph, node, _aten._to_copy.default, argument, dtype=torch.float32)
                node.replace_input_with(argument, wide)
        renewed(node)
        for part in parts:
            renewed(part)
            if part.args[1] == 0:
                dtype = dtypes[part]
                result = inserted(graph, part.next, _aten._to_copy.default, part, dtype=dtype)
                part.replace_all_uses_with(result, lambda user, own=result: user is not own)
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def _is_mixed(node: fx.Node) -> bool:
    place = WEIGHT.get(node.target)  # type: ignore[call-overload]
    if place is None or not _is_narrow(node.args[0]):
        return False
    weight = node.args[place]
    return isinstance(weight, fx.Node) and weight.meta["val"].dtype == torch.float32


def _is_narrow(node: object) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype in _NARROW
