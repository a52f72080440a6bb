"""A step that is not finite changes nothing: the update becomes a branch of one ``If``."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx_ir as ir

from sam_export.artifact.contract import ProgramSpec


def guard_update(
    model: ir.Model, spec: ProgramSpec, discarded: Collection[str], condition: str = "finite"
) -> None:
    """Moves everything that only the discarded outputs need into ``If(finite)``.

    The other branch hands the old state on. An ``If`` costs nothing measurable, where a select
    over every state tensor costs as much as several updates.

    Args:
        model: The step; changed in place.
        spec: Its outputs, and which of them feed which state input.
        discarded: Outputs whose new state is dropped when the condition is false.
        condition: Name of the scalar bool output that decides.
    """
    graph = model.graph
    outputs = {value.name: value for value in graph.outputs}
    inputs = {value.name: value for value in graph.inputs}
    fed = [name for name in outputs if name in discarded]
    before = ancestors(value for name, value in outputs.items() if name not in discarded)
    update = [node for node in graph if node not in before]

    then_outputs, else_nodes, else_outputs, results = [], [], [], []
    for name in fed:
        value = outputs[name]
        result = ir.Value(name=name, type=value.type, shape=value.shape)
        results.append(result)
        value.name = f"updated/{spec.feeds[name]}"
        if value.producer() is None or value.producer() in before:
            copy = ir.node("Identity", [value], name=f"update/Identity/{spec.feeds[name]}")
            copy.outputs[0].name = f"updated/{spec.feeds[name]}/copy"
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            update.append(copy)
            value = copy.outputs[0]
        then_outputs.append(value)
        keep = ir.node("Identity", [inputs[spec.feeds[name]]], name=f"keep/{spec.feeds[name]}")
        keep.outputs[0].name = f"kept/{spec.feeds[name]}"
        keep.outputs[0].type, keep.outputs[0].shape = value.type, value.shape
        else_nodes.append(keep)
        else_outputs.append(keep.outputs[0])

    decision = outputs[condition]
    replaced = dict(zip(fed, results, strict=True))
    ordered = [replaced.get(name, value) for name, value in outputs.items()]
    graph.outputs.clear()
    graph.remove([node for node in update if node.graph is graph])
    then_graph = ir.Graph([], then_outputs, nodes=update, name="finite")
    else_graph = ir.Graph([], else_outputs, nodes=else_nodes, name="not_finite")
    branch = ir.Node(
        "",
        "If",
        [decision],
        [ir.AttrGraph("then_branch", then_graph), ir.AttrGraph("else_branch", else_graph)],
        outputs=results,
        name="update/If",
    )
    graph.append(branch)
    graph.outputs.extend(ordered)


def ancestors(values: Iterable[ir.Value | None]) -> set[ir.Node]:
    """Every node that the given values depend on, within their graph."""
    seen: set[ir.Node] = set()
    pending = [value.producer() for value in values if value is not None]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending.extend(value.producer() for value in node.inputs if value is not None)
    return seen
