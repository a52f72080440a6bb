"""Nodes, constants and operator sets that nothing needs."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common


class RemoveDeadCode(ir.passes.InPlacePass):  # type: ignore[misc]
    """Removes what no output of the graph depends on.

    Ensures:
        Every node has an output that is read or is an output of the graph. Inputs stay.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        nodes = common.RemoveUnusedNodesPass()(model).modified
        sets = common.RemoveUnusedOpsetsPass()(model).modified
        return ir.passes.PassResult(model, nodes or sets)

    def ensures(self, model: ir.Model) -> None:
        """See the class."""
        for node in model.graph:
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                raise ir.passes.PostconditionError(f"Nothing reads {node.op_type} {node.name!r}.")
