"""Which operators of a functional graph may overwrite an operand instead of allocating.

A whole step in fresh memory takes a pass over each weight for every temporary. An elementwise
operator may write over an operand that nobody reads afterwards, as eager optimizers do.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_COMMUTATIVE = {torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor}
# Views whose schema does not say so.
_SILENT_VIEWS = {
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.unsafe_split.Tensor,
    torch.ops.aten.unsafe_split_with_sizes.default,
}


@dataclass(frozen=True)
class Plan:
    """Where the values of a graph live.

    Attributes:
        overwrites: Node to the position of the operand that it writes over.
        memory: Node to the node that allocated its memory (itself, or what it is a view of or
            overwrites, at the start of the chain).
        whole: Node to the input whose tensor it is, unchanged in shape: it was made by
            overwriting that input.
    """

    overwrites: dict[fx.Node, int]
    memory: dict[fx.Node, fx.Node]
    whole: dict[fx.Node, fx.Node]


def plan_in_place(
    order: Sequence[fx.Node],
    results: Collection[fx.Node],
    inputs: Iterable[fx.Node],
    replaced: Collection[fx.Node],
    changing: Collection[fx.Node],
) -> Plan:
    """Decides for every node, in the order in which they run.

    A node overwrites an operand if it is elementwise; result and operand have the same static
    shape, strides and dtype, and no element of the operand lies in memory twice; no other operand
    shares the operand's memory; nobody reads that memory later; and the memory was allocated in
    this graph, or belongs to an input that is replaced at the end anyway.

    Args:
        order: Every computing node, in the order in which they run.
        results: The nodes whose values leave the graph.
        inputs: The graph's inputs.
        replaced: Those inputs that are overwritten with new values at the end.
        changing: Those nodes that run only when inputs may change.
    """
    place = {node: index for index, node in enumerate(order)}
    memory: dict[fx.Node, fx.Node] = {node: node for node in inputs}
    members: dict[fx.Node, list[fx.Node]] = {node: [node] for node in memory}
    whole = {node: node for node in memory}
    overwrites: dict[fx.Node, int] = {}

    def join(node: fx.Node, source: fx.Node) -> None:
        memory[node] = memory[source]
        members[memory[source]].append(node)

    def read_later(origin: fx.Node, now: int) -> bool:
        held = members[origin]
        return any(node in results for node in held) or any(
            place.get(user, -1) > now for node in held for user in node.users
        )

    def may_overwrite(node: fx.Node, operand: Any) -> bool:
        if not isinstance(operand, fx.Node) or operand.meta.get("val") is None:
            return False
        origin = memory[operand]
        if origin.op != "call_function" and not (origin in replaced and node in changing):
            return False
        others = [other for other in node.all_input_nodes if other is not operand]
        return (
            _same_form(node.meta.get("val"), operand.meta["val"])
            and all(memory[other] is not origin for other in others)
            and not read_later(origin, place[node])
        )

    for node in order:
        source = view_source(node)
        if source is not None:
            join(node, source)
            continue
        for index in _candidates(node):
            operand = node.args[index]
            if may_overwrite(node, operand):
                assert isinstance(operand, fx.Node)
                overwrites[node] = index
                join(node, operand)
                if operand in whole:
                    whole[node] = whole[operand]
                break
        else:
            memory[node] = node
            members[node] = [node]
    return Plan(overwrites, memory, whole)


def in_place_form(target: Any) -> torch._ops.OpOverload | None:
    """The operator that does the same to its first operand; None where there is none."""
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags:
        return None
    namespace, _, name = str(target.overloadpacket).partition(".")
    packet = getattr(getattr(torch.ops, namespace), f"{name}_", None)
    form = getattr(packet, target._overloadname, None)
    return form if isinstance(form, torch._ops.OpOverload) else None


def view_source(node: fx.Node) -> fx.Node | None:
    """What ``node`` is a view of, or may be; None when it has memory of its own."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        source: Any = node.args[0]
        return source if view_source(source) is not None else None
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload) and (
        target in _SILENT_VIEWS
        or any(item.alias_info is not None for item in target._schema.returns)
    ):
        return node.all_input_nodes[0]
    return None


def _candidates(node: fx.Node) -> tuple[int, ...]:
    if in_place_form(node.target) is None:
        return ()
    swap = node.target in _COMMUTATIVE and "alpha" not in node.kwargs
    return (0, 1) if swap else (0,)


def _same_form(result: Any, operand: Any) -> bool:
    if not isinstance(result, torch.Tensor) or result.dtype != operand.dtype:
        return False
    sizes, strides = tuple(operand.shape), tuple(operand.stride())
    if not all(isinstance(number, int) for number in (*sizes, *strides, *result.shape)):
        return False
    if tuple(result.shape) != sizes or tuple(result.stride()) != strides:
        return False
    # Each dimension steps over all that the smaller ones cover: no two elements in one place.
    reach = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size > 1:
            if stride < reach:
                return False
            reach = stride * size
    return True
