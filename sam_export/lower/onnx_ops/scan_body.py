"""The body of an ONNX ``Scan``, written while an ONNX form runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from sam_export._compat.onnx_nodes import scan


class ScanBody:
    """The subgraph of a ``Scan``, made node by node."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []

    def input(self, like: ir.Value, shape: Sequence[Any]) -> ir.Value:
        """A state, or one token of a sequence."""
        name = f"{self.name}.input_{len(self.inputs)}"
        type_ = None if like.dtype is None else ir.TensorType(like.dtype)
        self.inputs.append(ir.Value(name=name, shape=ir.Shape(shape), type=type_))
        return self.inputs[-1]

    def add(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """The result of one node."""
        return self.parts(kind, 1, *inputs, **attributes)[0]

    def parts(self, kind: str, count: int, *inputs: ir.Value, **attributes: Any) -> list[ir.Value]:
        """The results of one node."""
        node = ir.node(kind, list(inputs), attributes=attributes, num_outputs=count)
        node.name = f"{self.name}.{len(self.nodes)}"
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}.{index}"
        self.nodes.append(node)
        return list(node.outputs)

    def times(self, *factors: ir.Value) -> ir.Value:
        """Their product."""
        product, *rest = factors
        for factor in rest:
            product = self.add("Mul", product, factor)
        return product

    def slope(self, s: ir.Value) -> ir.Value:
        """``s (1 - s)``: the slope of a sigmoid that is ``s``."""
        return self.add("Sub", s, self.add("Mul", s, s))

    def without(self, value: ir.Value, part: ir.Value) -> ir.Value:
        """``value (1 - part^2)``: through a tanh that is ``part``."""
        return self.add("Sub", value, self.add("Mul", value, self.add("Mul", part, part)))

    def scan(
        self, given: Sequence[ir.Value], outputs: list[ir.Value], tokens: int, back: bool
    ) -> Any:
        """The ``Scan``: states first, then ``tokens`` sequences; ``back`` from the last token on.

        ``outputs`` are the new states, then what each token gives. No value may be two of them, not
        even through an ``Identity``, which the simplification takes out: ONNX Runtime's results
        are then wrong.
        """
        assert len({id(value) for value in outputs}) == len(outputs)
        states = len(given) - tokens
        for value in outputs:  # a subgraph says of what type its results are
            value.type = self.inputs[0].type
        for value, state in zip(outputs, self.inputs[:states], strict=False):
            value.shape = state.shape
        body = ir.Graph(self.inputs, outputs, nodes=self.nodes, name=self.name)
        direction = int(back)
        return scan(
            given,
            body,
            num_scan_inputs=tokens,
            scan_input_directions=[direction] * tokens,
            scan_output_directions=[direction] * (len(outputs) - states),
        )
