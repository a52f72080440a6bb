"""Loops over the tokens of a sequence: ONNX ``Scan``, for any number of tokens.

ONNX's ``LSTM`` has no gradient and ONNX Runtime's CPU has it in float32 only, and it does not give
out the gates; so both directions are written out, in the terms of `tracing.recurrent`. The weight
is a state that each step hands on, because what a subgraph reads from outside is no input of its
node and easily overlooked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

import sam_export.tracing.recurrent  # noqa: F401  (makes the operators)
from sam_export._compat.onnx_nodes import scan
from sam_export.lower.onnx_ops.table import ints, lowering, scalar, sizes, static


class _Body:
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

    def scan(
        self, given: Sequence[ir.Value], outputs: list[ir.Value], tokens: int, back: bool
    ) -> Any:
        """The ``Scan``: states first, then ``tokens`` sequences; ``back`` from the last token on.

        ``outputs`` are the new states, then what each token gives.
        """
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


@lowering("sam_export::lstm_steps")
def lstm_steps(x: ir.Value, h: ir.Value, c: ir.Value, w: ir.Value) -> tuple[Any, Any, Any]:
    """sam_export::lstm_steps(Tensor x, Tensor h, Tensor c, Tensor w) -> (Tensor, Tensor, Tensor)

    The formulas of `tracing.recurrent`, one token a step.
    """
    width, batch = static("A state", sizes(w)[1:])[0], sizes(x)[1]
    turned = op.Transpose(w, perm=[1, 0])
    body = _Body("lstm_step")
    weight = body.input(w, [width, 4 * width])
    # One tensor, as the new state and cell are results of their own: ONNX Runtime's Scan goes wrong
    # where one value is two results, and an Identity between does not outlive the simplification.
    both = body.input(x, [batch, 2 * width])
    before, cell = body.parts("Split", 2, both, axis=1, num_outputs=2)
    token = body.input(x, [batch, 4 * width])
    quarters = body.add("Add", token, body.add("MatMul", before, weight))
    i, f, g, o = body.parts("Split", 4, quarters, axis=1, num_outputs=4)
    i, f, g, o = (body.add(k, v) for k, v in zip(_ACTIVATIONS, (i, f, g, o), strict=True))
    new_cell = body.add("Add", body.add("Mul", f, cell), body.add("Mul", i, g))
    state = body.add("Mul", o, body.add("Tanh", new_cell))
    gates = body.add("Concat", i, f, g, o, axis=1)
    handed_on = [body.add("Identity", weight), body.add("Concat", state, new_cell, axis=1)]
    first = op.Concat(h, c, axis=1)
    outputs = [*handed_on, state, new_cell, gates]
    _, _, states, cells, all_gates = body.scan([turned, first, x], outputs, 1, back=False)
    return states, cells, all_gates


@lowering("sam_export::lstm_steps_backward")
def lstm_steps_backward(
    dstates: ir.Value,
    dcells: ir.Value,
    gates: ir.Value,
    cells: ir.Value,
    before: ir.Value,
    w: ir.Value,
) -> tuple[Any, Any, Any]:
    """sam_export::lstm_steps_backward(Tensor dstates, Tensor dcells, Tensor gates, Tensor cells,
    Tensor before, Tensor w) -> (Tensor, Tensor, Tensor)

    The formulas of `tracing.recurrent`, from the last token to the first.
    """
    hidden, batch = sizes(w)[1], sizes(gates)[1]
    shape = [batch, hidden]
    size = op.Concat(op.Shape(gates, start=1, end=2), ints(*static("A state", [hidden])), axis=0)
    zeros = op.Expand(scalar(0.0, gates), size)
    body = _Body("lstm_step_backward")
    weight = body.input(w, sizes(w))
    dh, dc = body.input(gates, shape), body.input(gates, shape)
    dstate, dcell = body.input(gates, shape), body.input(gates, shape)
    own_gates = body.input(gates, [batch, sizes(gates)[2]])
    cell, last = body.input(gates, shape), body.input(gates, shape)

    def times(*factors: ir.Value) -> ir.Value:
        product, *rest = factors
        for factor in rest:
            product = body.add("Mul", product, factor)
        return product

    def slope(gate: ir.Value) -> ir.Value:
        return body.add("Sub", gate, body.add("Mul", gate, gate))  # of a sigmoid: s - s^2

    def without(value: ir.Value, part: ir.Value) -> ir.Value:
        return body.add("Sub", value, body.add("Mul", value, body.add("Mul", part, part)))

    i, f, g, o = body.parts("Split", 4, own_gates, axis=1, num_outputs=4)
    bent = body.add("Tanh", cell)
    dh = body.add("Add", dstate, dh)
    through = without(times(dh, o), bent)  # dh * o * (1 - tanh^2)
    dc = body.add("Add", body.add("Add", dcell, dc), through)
    quarters = (
        times(dc, g, slope(i)),
        times(dc, last, slope(f)),
        without(times(dc, i), g),
        times(dh, bent, slope(o)),
    )
    dx = body.add("Concat", *quarters, axis=1)
    outputs = [
        body.add("Identity", weight),
        body.add("MatMul", dx, weight),
        body.add("Mul", dc, f),
        dx,
    ]
    given = [w, zeros, zeros, dstates, dcells, gates, cells, before]
    _, first_dh, first_dc, parts = body.scan(given, outputs, 5, back=True)
    return parts, first_dh, first_dc


_ACTIVATIONS = ("Sigmoid", "Sigmoid", "Tanh", "Sigmoid")
