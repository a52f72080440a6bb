"""What is computed twice is computed once."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common


class CommonSubexpressions(ir.passes.InPlacePass):  # type: ignore[misc]
    """Nodes of one operator, with the same inputs and attributes, become one.

    Both passes of a step share what does not depend on the weights (masks, indices, sizes), and the
    evaluation of a norm or a mask is written out at each use.

    Requires:
        No function is left, and no operator draws random numbers: two such nodes are two draws.

    Ensures:
        The outputs of the graph have the names that they had.
    """

    def requires(self, model: ir.Model) -> None:
        """See the class."""
        if model.functions:
            raise ir.passes.PreconditionError("Inline the functions first.")
        for node in model.graph:
            if node.op_type.startswith(("Random", "Bernoulli", "Multinomial")) and not node.domain:
                raise ir.passes.PreconditionError(f"{node.op_type} {node.name!r} draws numbers.")
        self._names = [value.name for value in model.graph.outputs]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        return common.CommonSubexpressionEliminationPass()(model)

    def ensures(self, model: ir.Model) -> None:
        """See the class."""
        names = [value.name for value in model.graph.outputs]
        if names != self._names:
            raise ir.passes.PostconditionError(f"The outputs were {self._names}, now {names}.")
