"""Functions of the exporter's library become plain nodes."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common


class Inline(ir.passes.InPlacePass):  # type: ignore[misc]
    """Every call of a function becomes the function's nodes.

    Ensures:
        The model has no functions, and no node of the graph calls one.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        return common.InlinePass()(model)

    def ensures(self, model: ir.Model) -> None:
        """See the class."""
        if model.functions:
            raise ir.passes.PostconditionError(
                f"{len(model.functions)} functions are left, such as {next(iter(model.functions))}."
            )
