"""The graphs of onnxruntime-training's own API: training model and evaluation model.

The API binds graph inputs by name: what is called like a parameter of the checkpoint is that
parameter, ``<parameter>_grad.accumulation.buffer`` is its gradient, ``lazy_reset_grad`` says
whether the gradient starts anew; every other input is the caller's. It has no notion of state that
changes but for the trained parameters. Such state is a frozen parameter of the checkpoint here,
and the graph writes it in place by ``InPlaceAccumulatorV2(state, new, overwrite=true)``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sam_export.artifact.contract import ProgramSpec
from sam_export.errors import LoweringError
from sam_export.lower.onnx_guard import ancestors
from sam_export.lower.onnx_in_place import captured_values, readers
from sam_export.lower.onnx_passes.common_subexpressions import CommonSubexpressions
from sam_export.lower.onnx_passes.dead_code import RemoveDeadCode
from sam_export.lower.onnx_training_nodes import TRAINING_DOMAIN
from sam_export.lower.ort_artifacts_plan import GRADIENT, Plan

BUFFER = "_grad.accumulation.buffer"
"""Suffix of the input that is a parameter's gradient."""

RESET = "lazy_reset_grad"
"""Input: whether the gradients start anew."""

WRITTEN = "state_grad.accumulation.out"
"""Output that holds the flags of all writes; the API hides outputs with this ending."""


def finish_training_model(
    model: ir.Model,
    spec: ProgramSpec,
    plan: Plan,
    trained: Sequence[str],
    inputs: Sequence[str],
    kept_if_not_finite: Collection[str],
    guarded: bool,
    branch: bool = True,
) -> None:
    """Binds gradients and new state to where they are kept.

    Args:
        model: The step as a pure function; changed in place.
        spec: Its outputs: metrics first, then ``gradient.<parameter>``, then new state.
        plan: Where the update goes.
        trained: The parameters that have a gradient buffer.
        inputs: Names of the graph inputs, in their final order.
        kept_if_not_finite: Outputs whose new state is kept even if the step is not finite.
        guarded: Whether a step that is not finite changes nothing. The smallest gradient is NaN
            then, which tells the optimizer model not to do anything.
        branch: Whether the guard is an ``If``; otherwise each value that is written is selected
            (see `onnx_cuda.select_update`).
    """
    graph = model.graph
    outputs = {value.name: value for value in graph.outputs}
    buffers = {name: _gradient_buffer(graph, name, outputs) for name in trained}
    _input(graph, RESET, ir.DataType.BOOL, (1,))
    results = [
        value
        for name, value in outputs.items()
        if name not in spec.feeds and not str(name).startswith(GRADIENT)
    ]
    always = [name for name in spec.feeds if not guarded or name in kept_if_not_finite]
    guards = [name for name in spec.feeds if name not in always]
    gradients = list(trained) if plan.kind != "parameters" else []
    stored_as_float32(model, spec.feeds.values())
    states = {value.name: value for value in graph.inputs}

    writer = _Writer(states[RESET], "update")
    flags = writer.states(outputs, {name: states[spec.feeds[name]] for name in always})
    if not guarded:
        flags += writer.gradients(outputs, {name: buffers[name] for name in gradients})
        graph.outputs[:] = results
        graph.extend(writer.nodes)
        written = _joined(flags, WRITTEN)
        graph.append(written)
        graph.outputs.append(written.outputs[0])
    elif not branch:
        selected = {name: states[spec.feeds[name]] for name in guards}
        _selected(writer, outputs, selected, {name: buffers[name] for name in gradients})
        flags += writer.states(outputs, selected)
        flags += writer.gradients(outputs, {name: buffers[name] for name in gradients})
        graph.outputs[:] = results
        graph.extend(writer.nodes)
        written = _joined(flags, WRITTEN)
        graph.append(written)
        graph.outputs.append(written.outputs[0])
    else:
        graph.extend(writer.nodes)
        graph.outputs[:] = [*results, *flags]  # what runs in any case
        guard = _guarded(
            graph,
            outputs,
            {name: states[spec.feeds[name]] for name in guards},
            {name: buffers[name] for name in gradients},
            states[RESET],
        )
        graph.append(guard)
        graph.outputs[:] = [*results, guard.outputs[0]]
        if flags:
            kept = _joined(flags, f"step_{WRITTEN}")
            graph.append(kept)
            graph.outputs.append(kept.outputs[0])
    _refuse_late_readers(graph, {value.name for value in graph.inputs})
    order_inputs(graph, inputs)
    model.opset_imports[TRAINING_DOMAIN] = 1


def evaluation_model(loss: ir.Model, outputs: ir.Model, inputs: Sequence[str]) -> ir.Model:
    """One model that returns the loss and the model's outputs; what both compute is shared.

    Args:
        loss: The program ``evaluate_loss``; it becomes the result.
        outputs: The program ``evaluate``; it is taken apart.
        inputs: Names of the graph inputs, in their final order.
    """
    graph = loss.graph
    present = {value.name: value for value in graph.inputs}
    for value in list(outputs.graph.inputs):
        assert value.name is not None
        if value.name not in present:
            present[value.name] = _input(graph, value.name, value.dtype, value.shape)
        value.replace_all_uses_with(present[value.name], replace_graph_outputs=True)
    results = list(outputs.graph.outputs)
    nodes = list(outputs.graph)
    fixed = {value.name for value in results}
    constants = list(outputs.graph.initializers.values())
    outputs.graph.initializers.clear()
    outputs.graph.outputs.clear()
    outputs.graph.remove(nodes)
    for value in constants:
        value.name = f"outputs/{value.name}"
        graph.initializers[value.name] = value
    for node in nodes:
        node.name = f"outputs/{node.name}"
        for value in node.outputs:
            if value.name not in fixed:
                value.name = f"outputs/{value.name}"
    graph.extend(nodes)
    graph.outputs.extend(results)
    CommonSubexpressions()(loss)
    RemoveDeadCode()(loss)
    order_inputs(graph, inputs)
    return loss


def stored_as_float32(model: ir.Model, states: Collection[str]) -> None:
    """Makes state of other dtypes float32 inputs, cast where they are read.

    ``InPlaceAccumulatorV2`` writes float32 only. A counter is exact up to 2^24.

    Args:
        model: Changed in place; new values are cast where they are written.
        states: Names of the inputs that the training model writes.
    """
    graph = model.graph
    for value in list(graph.inputs):
        if value.name in states and value.dtype != ir.DataType.FLOAT:
            name, dtype = value.name, value.dtype
            stored = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
            cast = ir.node("Cast", [stored], {"to": int(dtype)}, name=f"read/{name}")  # type: ignore[arg-type]
            cast.outputs[0].name = f"read/{name}"
            cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
            value.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
            graph.inputs[list(graph.inputs).index(value)] = stored
            _at_the_start(graph, cast)


def order_inputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Puts the inputs in order; drops those that are not named, which nothing may read."""
    present = {value.name: value for value in graph.inputs}
    for name, value in present.items():
        if name not in names and list(value.uses()):
            raise LoweringError(f"The graph still reads {name!r}, which is not an input of it.")
    graph.inputs[:] = [present[name] for name in names]


class _Writer:
    """Nodes that write in place, and the flags that they return."""

    def __init__(self, reset: ir.Value, prefix: str) -> None:
        self.nodes: list[ir.Node] = []
        self._reset = reset
        self._prefix = prefix
        self._true: ir.Value | None = None

    def gradients(
        self, outputs: Mapping[str | None, ir.Value], buffers: Mapping[str, ir.Value]
    ) -> list[ir.Value]:
        """``buffer = reset ? gradient : buffer + gradient``."""
        return [
            self._write(buffer, outputs[GRADIENT + name], self._reset, f"accumulate/{name}")
            for name, buffer in buffers.items()
        ]

    def states(
        self, outputs: Mapping[str | None, ir.Value], states: Mapping[str, ir.Value]
    ) -> list[ir.Value]:
        """``state = new``."""
        flags = []
        for output, state in states.items():
            new = outputs[output]
            if new.dtype != ir.DataType.FLOAT:
                cast = ir.node(
                    "Cast", [new], {"to": int(ir.DataType.FLOAT)}, name=f"store/{output}"
                )
                cast.outputs[0].name = f"store/{output}"
                cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
                cast.outputs[0].shape = new.shape
                self.nodes.append(cast)
                new = cast.outputs[0]
            flags.append(self._write(state, new, self.true(), f"write/{state.name}"))
        return flags

    def poison(self, buffer: ir.Value) -> ir.Value:
        """``buffer = NaN``."""
        number = np.full(buffer.shape.numpy(), np.nan, np.float32)  # type: ignore[union-attr]
        nan = self.constant("not_finite/nan", number)
        return self._write(buffer, nan, self.true(), "not_finite/write")

    def constant(self, name: str, number: NDArray[Any]) -> ir.Value:
        node = ir.node("Constant", [], {"value": ir.tensor(number)}, name=name)
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(number.dtype))
        node.outputs[0].shape = ir.Shape(number.shape)
        self.nodes.append(node)
        return node.outputs[0]

    def true(self) -> ir.Value:
        if self._true is None:
            self._true = self.constant(f"{self._prefix}/true", np.array([True]))
        return self._true

    def _write(self, buffer: ir.Value, new: ir.Value, mode: ir.Value, name: str) -> ir.Value:
        node = ir.node(
            "InPlaceAccumulatorV2", [buffer, new, mode], domain=TRAINING_DOMAIN, name=name
        )
        flag = node.outputs[0]
        flag.name = f"{name}/flag"
        flag.type, flag.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape((1,))
        self.nodes.append(node)
        return flag


def _selected(
    writer: _Writer,
    outputs: dict[str | None, ir.Value],
    states: Mapping[str, ir.Value],
    buffers: Mapping[str, ir.Value],
) -> None:
    """What is written is chosen by ``finite``: else the old state, no gradient, and one NaN."""
    smallest = min(buffers, key=lambda name: _elements(buffers[name]), default="")
    others: dict[str, ir.Value] = dict(states)
    for name in buffers:
        number = np.array(np.nan if name == smallest else 0.0, np.float32)
        others[GRADIENT + name] = writer.constant(f"not_finite/{name}", number)
    for name, other in others.items():
        new = outputs[name]
        if other.dtype != new.dtype:  # a state that is kept as float32
            cast = ir.node("Cast", [other], {"to": int(new.dtype)}, name=f"old/{name}")  # type: ignore[arg-type]
            cast.outputs[0].name = cast.name
            cast.outputs[0].type, cast.outputs[0].shape = new.type, new.shape
            writer.nodes.append(cast)
            other = cast.outputs[0]
        node = ir.node("Where", [outputs["finite"], new, other], name=f"select/{name}")
        node.outputs[0].name = node.name
        node.outputs[0].type, node.outputs[0].shape = new.type, new.shape
        writer.nodes.append(node)
        outputs[name] = node.outputs[0]


def _elements(value: ir.Value) -> int:
    return int(np.prod(value.shape.numpy()))  # type: ignore[union-attr]


def _guarded(
    graph: ir.Graph,
    outputs: Mapping[str | None, ir.Value],
    states: Mapping[str, ir.Value],
    buffers: Mapping[str, ir.Value],
    reset: ir.Value,
) -> ir.Node:
    """``If(finite)``: all that is computed and written only then; the flags of the writes."""
    before = ancestors(graph.outputs)
    update = [node for node in graph if node not in before]
    graph.remove(update)
    then, other = _Writer(reset, "finite"), _Writer(reset, "not_finite")
    flags = then.states(outputs, states) + then.gradients(outputs, buffers)
    none = []
    if buffers:
        smallest = min(buffers.values(), key=_elements)
        none.append(other.poison(smallest))
    done = _joined(flags or [then.true()], "finite/flags")
    undone = _joined(none or [other.true()], "not_finite/flags")
    then_graph = ir.Graph([], done.outputs, nodes=[*update, *then.nodes, done], name="finite")
    else_graph = ir.Graph([], undone.outputs, nodes=[*other.nodes, undone], name="not_finite")
    decision = outputs["finite"]
    branch = ir.node(
        "If",
        [decision],
        {"then_branch": then_graph, "else_branch": else_graph},
        name="update/If",
    )
    branch.outputs[0].name = WRITTEN
    branch.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
    branch.outputs[0].shape = ir.Shape((None,))
    return branch


def _joined(flags: Sequence[ir.Value], name: str) -> ir.Node:
    node = ir.node("Concat", list(flags), {"axis": 0}, name=name)
    node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
    node.outputs[0].shape = ir.Shape((len(flags),))
    return node


def _gradient_buffer(
    graph: ir.Graph, name: str, outputs: Mapping[str | None, ir.Value]
) -> ir.Value:
    (parameter,) = (value for value in graph.inputs if value.name == name)
    return _input(graph, name + BUFFER, ir.DataType.FLOAT, parameter.shape)


def _input(graph: ir.Graph, name: str, dtype: ir.DataType | None, shape: object) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))  # type: ignore[arg-type]
    graph.inputs.append(value)
    return value


def _at_the_start(graph: ir.Graph, node: ir.Node) -> None:
    first = next(iter(graph), None)
    if first is None:
        graph.append(node)
    else:
        graph.insert_before(first, node)


def _refuse_late_readers(graph: ir.Graph, states: Collection[str | None]) -> None:
    """Everything that reads a state tensor has to run before it is overwritten.

    Raises:
        LoweringError: A reader is not known to.
    """
    for outer in graph:
        branches = [
            attribute.as_graph()
            for attribute in outer.attributes.values()
            if attribute.type == ir.AttributeType.GRAPH
        ]
        waited = ancestors([*outer.inputs, *captured_values(outer)]) if branches else set()
        for node in [outer, *(inner for branch in branches for inner in branch)]:
            source = node.inputs[0] if node.op_type == "InPlaceAccumulatorV2" else None
            if source is None or source.name not in states:
                continue
            before = ancestors(node.inputs) | waited
            for reader in readers(source):
                # The other branch never runs together with this one.
                other = node is not outer and reader.graph is not node.graph
                if reader is node or reader in before or (other and reader.graph in branches):
                    continue
                raise LoweringError(
                    f"{reader.name} reads {source.name!r} and may run after {node.name}, which "
                    "overwrites it; the stock training API has no place for a second buffer. "
                    "Use target onnx-training or onnx."
                )
