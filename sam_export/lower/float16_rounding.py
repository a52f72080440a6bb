"""A float16 graph as one in float32 that rounds to float16 wherever ATen does.

ONNX Runtime's CPU has next to no float16 kernels: it casts the operands to float32 and back, and
leaves out each cast back that is followed by another cast. What overflows in float16 does not
overflow then, and a step that has to be skipped trains. So the graph says itself that it computes
in float32 (as ATen's own kernels do inside), and each result passes through an operator that ONNX
Runtime has for float16, which keeps the rounding (`onnx_ops.half`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from sam_export._compat.program import inserted, renewed, returning

_aten = torch.ops.aten

_WITH_HALF_TO_FLOAT = {_aten._softmax.default, _aten._log_softmax.default}
"""Their third argument says to compute a float32 result from a float16 operand."""


@torch.library.custom_op("sam_export::rounded_to_float16", mutates_args=())
def rounded_to_float16(x: Tensor) -> Tensor:
    """``x``, float32, rounded to float16 as a cast does it: to even, to infinity above 65519."""
    return x.half().float()


@rounded_to_float16.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


_ROUNDED = torch.ops.sam_export.rounded_to_float16.default


def rounding_to_float16(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """``program`` without float16 inside; what goes in and out of it keeps its dtype.

    Every value that was float16 is float32, and one that float16 can hold: each result is rounded,
    but for views and copies of rounded values, which are rounded once more to no effect.

    Args:
        program: A functional program; it is not changed.
    """
    if not any(map(_is_half, program.graph.nodes)):
        return program
    return returning(program, _rewritten)


def _rewritten(
    graph: fx.Graph, inputs: Sequence[fx.Node], results: Sequence[fx.Node]
) -> Sequence[fx.Node]:
    halves = {node for node in graph.nodes if _is_half(node)}
    wide: dict[fx.Node, fx.Node] = {}
    """A node that was float16 to the float32 node that stands for it."""
    for node in list(graph.nodes):
        if node.op == "output":
            continue
        if node.op != "call_function":
            if node in halves:
                following = _after_placeholders(node)
                wide[node] = _cast(graph, following, node, torch.float32)
            continue
        if node not in halves and not any(n in wide for n in node.all_input_nodes):
            continue
        node.args = map_aggregate(node.args, lambda value: _widened(value, wide))  # type: ignore
        node.kwargs = map_aggregate(node.kwargs, lambda value: _widened(value, wide))  # type: ignore
        if node.target in _WITH_HALF_TO_FLOAT:
            node.args = (*node.args[:2], False)
        renewed(node)
        if node in halves and isinstance(node.meta["val"], Tensor):
            wide[node] = inserted(graph, node.next, _ROUNDED, node)
            wide[node].meta = {**node.meta, **wide[node].meta}
    return [
        _cast(graph, graph.output_node(), wide[node], torch.float16) if node in wide else node
        for node in results
    ]


def _widened(value: Any, wide: dict[fx.Node, fx.Node]) -> Any:
    if isinstance(value, fx.Node):
        return wide.get(value, value)
    return torch.float32 if value is torch.float16 else value


def _cast(graph: fx.Graph, before: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return inserted(graph, before, _aten._to_copy.default, node, dtype=dtype)


def _after_placeholders(node: fx.Node) -> fx.Node:
    while node.op in ("placeholder", "get_attr"):
        node = node.next
    return node


def _is_half(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float16
