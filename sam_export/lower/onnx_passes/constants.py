"""What depends on no input is computed at export; equal constants are stored once."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript.optimizer

_LARGEST = 4096
"""Elements of a folded result, at most: more is cheaper to compute than to store."""


class FoldConstants(ir.passes.InPlacePass):  # type: ignore[misc]
    """Nodes whose inputs are constants are replaced by their value, if it is small.

    Requires:
        No function is left: what a function computes is not seen.

    Ensures:
        The graph's inputs and outputs keep their names.
    """

    def requires(self, model: ir.Model) -> None:
        """See the class."""
        if model.functions:
            raise ir.passes.PreconditionError("Inline the functions first.")
        self._names = _names(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        result = onnxscript.optimizer.fold_constants(model, output_size_limit=_LARGEST)
        return ir.passes.PassResult(model, bool(result.modified))

    def ensures(self, model: ir.Model) -> None:
        """See the class."""
        if _names(model) != self._names:
            raise ir.passes.PostconditionError("Inputs or outputs of the graph changed.")


class ShareConstants(ir.passes.InPlacePass):  # type: ignore[misc]
    """Constants become initializers, and equal ones one initializer.

    Ensures:
        No ``Constant`` node is left in the main graph.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        lifted = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
        changed = lifted(model).modified
        return ir.passes.PassResult(
            model, common.DeduplicateInitializersPass()(model).modified or changed
        )

    def ensures(self, model: ir.Model) -> None:
        """See the class."""
        left = [node.name for node in model.graph if node.op_type == "Constant"]
        if left:
            raise ir.passes.PostconditionError(f"Constants are left: {', '.join(map(str, left))}.")


def _names(model: ir.Model) -> list[str | None]:
    return [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
