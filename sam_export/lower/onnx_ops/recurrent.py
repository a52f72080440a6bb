"""Loops over the tokens of a sequence: ONNX ``Scan``, for any number of tokens.

ONNX's ``LSTM`` and ``GRU`` have no gradient, ONNX Runtime's CPU has them in float32 only, and they
do not give out the gates; so both passes are written out, by `tracing.lstm_steps` and
`tracing.gru_steps`. The weight is a state that each step hands on, because what a subgraph reads
from outside is no input of its node and easily overlooked.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

import sam_export.tracing.recurrent  # noqa: F401  (makes the operators)
from sam_export.lower.onnx_ops.scan_body import ScanBody
from sam_export.lower.onnx_ops.table import ints, lowering, scalar, sizes, static

_ACTIVATIONS = ("Sigmoid", "Sigmoid", "Tanh", "Sigmoid")


@lowering("sam_export::lstm_steps")
def lstm_steps(x: ir.Value, h: ir.Value, c: ir.Value, w: ir.Value) -> tuple[Any, Any, Any]:
    """sam_export::lstm_steps(Tensor x, Tensor h, Tensor c, Tensor w) -> (Tensor, Tensor, Tensor)

    The formulas of `tracing.lstm_steps`, one token a step.
    """
    width, batch = static("A state", sizes(w)[1:])[0], sizes(x)[1]
    turned = op.Transpose(w, perm=[1, 0])
    body = ScanBody("lstm_step")
    weight = body.input(w, [width, 4 * width])
    # One tensor, as the new state and cell are results of their own (see `ScanBody.scan`).
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

    The formulas of `tracing.lstm_steps`, from the last token to the first.
    """
    hidden, batch = static("A state", sizes(w)[1:])[0], sizes(gates)[1]
    shape = [batch, hidden]
    zeros = _zeros(gates, hidden)
    body = ScanBody("lstm_step_backward")
    weight = body.input(w, sizes(w))
    dh, dc = body.input(gates, shape), body.input(gates, shape)
    dstate, dcell = body.input(gates, shape), body.input(gates, shape)
    own_gates = body.input(gates, [batch, sizes(gates)[2]])
    cell, last = body.input(gates, shape), body.input(gates, shape)

    i, f, g, o = body.parts("Split", 4, own_gates, axis=1, num_outputs=4)
    bent = body.add("Tanh", cell)
    dh = body.add("Add", dstate, dh)
    through = body.without(body.times(dh, o), bent)  # dh * o * (1 - tanh^2)
    dc = body.add("Add", body.add("Add", dcell, dc), through)
    quarters = (
        body.times(dc, g, body.slope(i)),
        body.times(dc, last, body.slope(f)),
        body.without(body.times(dc, i), g),
        body.times(dh, bent, body.slope(o)),
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


@lowering("sam_export::gru_steps")
def gru_steps(x: ir.Value, h: ir.Value, w: ir.Value, b: ir.Value) -> tuple[Any, Any]:
    """sam_export::gru_steps(Tensor x, Tensor h, Tensor w, Tensor b) -> (Tensor, Tensor)

    The formulas of `tracing.gru_steps`, one token a step.
    """
    hidden, batch = static("A state", sizes(w)[1:])[0], sizes(x)[1]
    turned = op.Transpose(w, perm=[1, 0])
    body = ScanBody("gru_step")
    weight, bias = body.input(w, [hidden, 3 * hidden]), body.input(b, [3 * hidden])
    before = body.input(x, [batch, hidden])
    token = body.input(x, [batch, 3 * hidden])
    own = body.add("Add", body.add("MatMul", before, weight), bias)
    x_r, x_z, x_n = body.parts("Split", 3, token, axis=1, num_outputs=3)
    u_r, u_z, u_n = body.parts("Split", 3, own, axis=1, num_outputs=3)
    r = body.add("Sigmoid", body.add("Add", x_r, u_r))
    z = body.add("Sigmoid", body.add("Add", x_z, u_z))
    n = body.add("Tanh", body.add("Add", x_n, body.add("Mul", r, u_n)))
    state = body.add("Add", n, body.add("Mul", z, body.add("Sub", before, n)))
    # The state goes out as a part of the last result only (see `ScanBody.scan`).
    result = body.add("Concat", r, z, n, u_n, state, axis=1)
    handed_on = [body.add("Identity", weight), body.add("Identity", bias), state]
    _, _, _, results = body.scan([turned, b, h, x], [*handed_on, result], 1, back=False)
    ends = [4 * hidden, 5 * hidden]
    gates = op.Slice(results, ints(0), ints(ends[0]), ints(2))
    return op.Slice(results, ints(ends[0]), ints(ends[1]), ints(2)), gates


@lowering("sam_export::gru_steps_backward")
def gru_steps_backward(
    dstates: ir.Value, gates: ir.Value, before: ir.Value, w: ir.Value
) -> tuple[Any, Any]:
    """sam_export::gru_steps_backward(Tensor dstates, Tensor gates, Tensor before, Tensor w) ->
    (Tensor, Tensor)

    The formulas of `tracing.gru_steps`, from the last token to the first.
    """
    hidden, batch = static("A state", sizes(w)[1:])[0], sizes(gates)[1]
    shape = [batch, hidden]
    body = ScanBody("gru_step_backward")
    weight, dh = body.input(w, sizes(w)), body.input(gates, shape)
    dstate, own_gates = body.input(gates, shape), body.input(gates, [batch, 4 * hidden])
    last = body.input(gates, shape)
    r, z, n, u_n = body.parts("Split", 4, own_gates, axis=1, num_outputs=4)
    dh = body.add("Add", dstate, dh)
    kept = body.add("Mul", dh, z)
    dn = body.without(body.add("Sub", dh, kept), n)  # dh * (1 - z) * (1 - n^2)
    dr = body.times(dn, u_n, body.slope(r))
    dz = body.times(dh, body.add("Sub", last, n), body.slope(z))
    dx = body.add("Concat", dr, dz, dn, axis=1)
    du = body.add("Concat", dr, dz, body.add("Mul", dn, r), axis=1)
    new_dh = body.add("Add", kept, body.add("MatMul", du, weight))
    given = [w, _zeros(gates, hidden), dstates, gates, before]
    outputs = [body.add("Identity", weight), new_dh, dx]
    _, first_dh, parts = body.scan(given, outputs, 3, back=True)
    return parts, first_dh


def _zeros(sequence: ir.Value, hidden: int) -> Any:
    """[batch, hidden] for a sequence [tokens, batch, ...]."""
    size = op.Concat(op.Shape(sequence, start=1, end=2), ints(hidden), axis=0)
    return op.Expand(scalar(0.0, sequence), size)
