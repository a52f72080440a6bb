"""Nodes that only move or rename values, where the value is at hand already."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common


class RemoveCopies(ir.passes.InPlacePass):  # type: ignore[misc]
    """Drops identities and joins what comes in pairs.

    - ``Identity``, and ``Cast`` to the type that a value has.
    - ``Transpose`` of a ``Transpose`` is one, with ``perm = first[second]``; none, if that is the
      order that was there. A gradient of a matrix product is full of them.
    - ``Reshape`` of a ``Reshape`` is the second, if its sizes are constants without 0 (which would
      copy a size of its own input).

    Ensures:
        No such pair, ``Cast`` or ``Transpose`` is left in the main graph, but where a node makes an
        output of the graph out of an input, a constant or another output.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        modified = common.IdentityEliminationPass()(model).modified
        for node in list(model.graph):
            if _joined(node):
                modified = True
            if _is_nothing(node):
                _drop(node)
                modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """See the class."""
        for node in model.graph:
            if _source(node) is not None or (_is_nothing(node) and _droppable(node)):
                raise ir.passes.PostconditionError(f"{node.op_type} {node.name!r} is left.")


def _permutation(node: ir.Node) -> list[int] | None:
    given = node.attributes.get("perm")
    if given is not None:
        return list(given.as_ints())
    value = node.inputs[0]
    rank = None if value is None or value.shape is None else len(value.shape)
    return None if rank is None else list(reversed(range(rank)))


def _source(node: ir.Node) -> ir.Value | None:
    """What the first of a pair moves; None where ``node`` is not the second of one."""
    if node.domain or node.op_type not in ("Transpose", "Reshape") or node.inputs[0] is None:
        return None
    first = node.inputs[0].producer()
    if first is None or first.domain or first.op_type != node.op_type:
        return None
    if first.graph is not node.graph:
        return None
    if node.op_type == "Transpose":
        known = _permutation(node) is not None and _permutation(first) is not None
        return first.inputs[0] if known else None
    sizes = node.inputs[1].const_value if node.inputs[1] is not None else None
    return None if sizes is None or (sizes.numpy() == 0).any() else first.inputs[0]


def _joined(node: ir.Node) -> bool:
    changed = False
    while (source := _source(node)) is not None:
        if node.op_type == "Transpose":
            first = node.inputs[0].producer()  # type: ignore[union-attr]
            assert first is not None
            before, after = _permutation(first), _permutation(node)
            assert before is not None
            assert after is not None
            node.attributes["perm"] = ir.AttrInt64s("perm", [before[axis] for axis in after])
        node.replace_input_with(0, source)
        changed = True
    return changed


def _is_nothing(node: ir.Node) -> bool:
    value = node.inputs[0] if node.inputs else None
    if node.domain or value is None:
        return False
    if node.op_type == "Cast":
        return value.dtype is not None and value.dtype.value == node.attributes["to"].as_int()
    if node.op_type == "Transpose":
        order = _permutation(node)
        return order is not None and order == sorted(order)
    return False


def _droppable(node: ir.Node) -> bool:
    """Whether its input can stand for its result, which may be an output of the graph."""
    (result,), value = node.outputs, node.inputs[0]
    if not result.is_graph_output():
        return True
    made_here = value is not None and value.producer() is not None
    return made_here and not value.is_graph_output()  # type: ignore[union-attr]


def _drop(node: ir.Node) -> None:
    (result,), value = node.outputs, node.inputs[0]
    assert value is not None
    assert node.graph is not None
    if not _droppable(node):
        return
    value.type = value.type or result.type
    value.shape = value.shape if value.shape is not None else result.shape
    if result.is_graph_output():
        result.name, value.name = value.name, result.name
    result.replace_all_uses_with(value, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
