"""Arithmetic on symbolic sizes at full precision.

``2 / x.numel()`` with a symbolic batch (in the gradient of the mean squared error, in a variance
over the batch, in a user's own mean) is a number that the graph computes from a size. The exporter
has float32 for such a number, whatever the tensor that it meets: in a float64 step every gradient
is then off by 1e-8 of itself. Here it becomes a float64 tensor without dimensions, which is rounded
once, to the dtype of the tensor that it meets.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

aten = torch.ops.aten

_OPERATORS: dict[Any, Any] = {
    operator.truediv: aten.div.Tensor,
    operator.mul: aten.mul.Tensor,
    operator.add: aten.add.Tensor,
    operator.sub: aten.sub.Tensor,
    operator.neg: aten.neg.default,
    operator.pow: aten.pow.Tensor_Tensor,
    torch._sym_sqrt: aten.sqrt.default,  # type: ignore[attr-defined]
}


def sizes_in_float64(program: torch.export.ExportedProgram) -> None:
    """Turns the fractions that ``program`` computes from symbolic sizes into float64 tensors.

    Those that other operators compute (a root of a size) stay as they are, and what depends on
    them.

    Args:
        program: As it is about to be translated; changed in place.
    """
    graph = program.graph
    mode = detect_fake_mode([node.meta.get("val") for node in graph.nodes])
    if mode is None:
        return

    def made(before: fx.Node, target: Any, *arguments: Any, **named: Any) -> fx.Node:
        with graph.inserting_before(before):
            node: fx.Node = graph.call_function(target, arguments, named)
        node.meta = {key: value for key, value in before.meta.items() if key != "val"}
        with mode:
            node.meta["val"] = target(*fx.node.map_arg(arguments, lambda n: n.meta["val"]), **named)
        return node

    def as_tensor(value: Any, before: fx.Node) -> Any:
        if isinstance(value, fx.Node) and isinstance(value.meta["val"], torch.Tensor):
            return value
        return made(before, aten.scalar_tensor.default, value, dtype=torch.float64)

    for node in list(graph.nodes):
        if not _is_fraction(node):
            continue
        known = all(
            not _is_fraction(argument) for argument in node.all_input_nodes
        )  # else one that was left as it is
        if node.target is torch.sym_float:
            new = as_tensor(node.args[0], node)
        elif node.target in _OPERATORS and known:
            arguments = [as_tensor(argument, node) for argument in node.args]
            new = made(node, _OPERATORS[node.target], *arguments)
        else:
            continue
        for user in list(node.users):
            dtype = _dtype_met(user)
            met = new if dtype is None else made(user, aten._to_copy.default, new, dtype=dtype)
            user.replace_input_with(node, met)
        graph.erase_node(node)
    program.graph_module.recompile()


def _dtype_met(user: fx.Node) -> torch.dtype | None:
    """The dtype of the tensors that an operator combines a fraction with; None: it meets none."""
    values = [node.meta.get("val") for node in user.all_input_nodes]
    if not isinstance(user.target, torch._ops.OpOverload):
        return None
    return next((value.dtype for value in values if isinstance(value, torch.Tensor)), None)


def _is_fraction(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymFloat)
