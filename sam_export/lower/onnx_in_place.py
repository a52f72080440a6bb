"""Which new state tensors may be written over the old ones.

ONNX Runtime lets one buffer be bound as an input and as an output and never checks whether that is
safe. Writing over a state input ``s`` is safe when, in the graph, everything else that reads ``s``
has certainly run before the node that writes its new value, and that node reads ``s`` element by
element if it reads it at all. Execution order is not file order: only dependence counts.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from sam_export.artifact.contract import ProgramSpec
from sam_export.lower.onnx_guard import ancestors

ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Max", "Min", "Identity", "Cast", "Where", "Pow"}
)
"""Operators that read element ``i`` of each same-shaped input only for element ``i``."""

VIEWS = frozenset({"Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
"""Operators whose output may share its input's memory in ONNX Runtime."""


def in_place(model: ir.Model, spec: ProgramSpec) -> dict[str, str]:
    """For every state tensor that the step changes: ``""`` when it may be overwritten, or why not.

    Args:
        model: The step as it is shipped (after `guard_update`, where that is used).
        spec: Which outputs feed which state inputs.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    verdicts = {}
    for output in model.graph.outputs:
        if output.name in spec.feeds:
            name = spec.feeds[output.name]
            verdicts[name] = _verdict(inputs[name], output)
    return verdicts


def _verdict(source: ir.Value, output: ir.Value) -> str:
    if output.shape != source.shape or output.dtype != source.dtype:
        return "its new value has another shape or dtype"
    writer = output.producer()
    if writer is None:
        return "its new value is an input of the graph"
    if writer.op_type != "If":
        return _unsafe(source, output, set())
    # Everything in the outer graph that the If waits for, and all of one branch or the other.
    waited = ancestors([*writer.inputs, *captured_values(writer)])
    branches = [attribute.as_graph() for attribute in writer.attributes.values()]
    for reader in readers(source):
        if reader is not writer and reader.graph not in branches and reader not in waited:
            return f"{reader.name} reads it and may run after the update"
    index = list(writer.outputs).index(output)
    for branch in ("then_branch", "else_branch"):
        result = writer.attributes[branch].as_graph().outputs[index]
        reason = _unsafe(source, result, waited)
        if reason:
            return reason
    return ""


def _unsafe(source: ir.Value, result: ir.Value, waited: set[ir.Node]) -> str:
    writer = result.producer()
    if writer is None:
        return "its new value is made elsewhere"
    before = ancestors(writer.inputs) | waited
    for reader in readers(source):
        elsewhere = reader.graph is not writer.graph and reader not in waited
        if reader is writer or elsewhere:
            continue  # the other branch of the If never runs together with this one
        if reader not in before:
            return f"{reader.name} reads it and may run after {writer.name}"
    views = _views(source)
    reads = [value for value in writer.inputs if value is not None and value in views]
    if reads and (writer.op_type not in ELEMENTWISE or any(v is not source for v in reads)):
        return f"{writer.name} ({writer.op_type}) does not read it element by element"
    return ""


def readers(source: ir.Value) -> Iterator[ir.Node]:
    for view in _views(source):
        for use in view.uses():
            yield use.node


def _views(source: ir.Value) -> set[ir.Value]:
    """``source`` and every value that may share its memory."""
    found: set[ir.Value] = set()
    pending = [source]
    while pending:
        value = pending.pop()
        if value in found:
            continue
        found.add(value)
        for use in value.uses():
            if use.node.op_type in VIEWS and use.idx == 0 and not _is_result(use.node):
                pending.append(use.node.outputs[0])
    return found


def _is_result(node: ir.Node) -> bool:
    """A view that is a graph output is copied into the output's own buffer."""
    return any(value.is_graph_output() for value in node.outputs)


def captured_values(branch: ir.Node) -> Iterator[ir.Value]:
    """Values of the outer graph that the subgraphs of a node read."""
    for attribute in branch.attributes.values():
        if attribute.type != ir.AttributeType.GRAPH:
            continue
        graph = attribute.as_graph()
        for node in graph:
            for value in node.inputs:
                if value is not None and value.producer() is not None:
                    assert value.producer() is not None
                    if value.producer().graph is not graph:  # type: ignore[union-attr]
                        yield value
