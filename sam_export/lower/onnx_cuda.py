"""What an ONNX step for a CUDA device is written otherwise: nothing in it may leave the device.

ONNX Runtime runs sizes on the CPU and everything else on the device (`runtime.placement`). Two
things in a step cross over. The ``If`` around the update wants its condition in host memory, so
the host waits for the device in the middle of every step: `select_update` replaces it. And a
number computed from a symbolic size (the count of a mean over the batch) is copied to the device
where it meets a tensor: `sizes_on_device` lets a kernel write it there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from sam_export.artifact.contract import ProgramSpec

ON_HOST: dict[str, tuple[int, ...]] = {
    "Reshape": (1,),
    "Expand": (1,),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "Slice": (1, 2, 3, 4),
    "Pad": (1, 2, 3),
    "Tile": (1,),
    "Split": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "CumSum": (1,),
    "OneHot": (1,),
    "Resize": (1, 2, 3),
    "Loop": (0, 1),
    "If": (0,),
    "ReduceSum": (1,),
    "ReduceMean": (1,),
    "ReduceMax": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceSumSquare": (1,),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceLogSum": (1,),
    "ReduceLogSumExp": (1,),
    "GatherElementsGrad": (1,),
    "GatherGrad": (0,),
    "GatherNDGrad": (0,),
    "SliceGrad": (1, 2, 3, 4, 5),
}
"""Inputs that the CUDA kernels of ONNX Runtime read in host memory: sizes, axes, counts."""

_SMALL = 100
"""Elements of a constant that ONNX Runtime lets a node on the CPU read; larger ones are moved."""

_WHOLE = (ir.DataType.INT32, ir.DataType.INT64)


def select_update(
    model: ir.Model, spec: ProgramSpec, discarded: Collection[str], condition: str = "finite"
) -> None:
    """``new = finite ? updated : old`` for each discarded output, without a branch.

    The update is computed in any case; on a device a selection costs one pass over memory, and the
    host need not know how it comes out. A branch would also keep the step from being recorded as
    a CUDA graph.

    Args:
        model: The step; changed in place.
        spec: Its outputs, and which of them feed which state input.
        discarded: Outputs whose new state is dropped when the condition is false.
        condition: Name of the scalar bool output that decides.
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    results = []
    for value in list(graph.outputs):
        name = str(value.name)
        if name not in discarded:
            results.append(value)
            continue
        state = spec.feeds[name]
        value.name = f"updated/{state}"
        node = ir.node("Where", [outputs[condition], value, inputs[state]], name=f"select/{state}")
        result = node.outputs[0]
        result.name, result.type, result.shape = name, value.type, value.shape
        graph.append(node)
        results.append(result)
    graph.outputs[:] = results


def sizes_on_device(model: ir.Model) -> list[ir.Node]:
    """Numbers that the graph computes from sizes are written on the device where they are needed.

    ``Range(n, n + 1, 1)`` reads its arguments in host memory and writes ``[n]`` on the device, in
    whole numbers and so exactly; what follows (the rounding to float32, a quotient) is computed
    there again. Only scalars and vectors of one element are treated, and only the main graph.

    Returns:
        The nodes that compute nothing but sizes, which ONNX Runtime leaves to the CPU.
    """
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model)).graph
    known = {
        value.name: (
            ir.DataType(value.type.tensor_type.elem_type),
            [size.dim_value for size in value.type.tensor_type.shape.dim],
        )
        for value in inferred.value_info
        if value.type.tensor_type.HasField("shape")
    }
    return _Sizes(model.graph, known).run()


class _Sizes:
    """`sizes_on_device` at work; ``known`` are dtypes and shapes, 0 for a symbolic size."""

    def __init__(
        self, graph: ir.Graph, known: Mapping[str, tuple[ir.DataType, Sequence[int]]]
    ) -> None:
        self._known = known
        self._graph = graph
        self._host: set[ir.Value] = set()
        self._copies: dict[ir.Value, ir.Value | None] = {}

    def run(self) -> list[ir.Node]:
        on_host: list[ir.Node] = []
        for node in list(self._graph):
            if node.op_type in ("Shape", "Size") or self._on_cpu(node):
                self._host.update(node.outputs)
            else:
                for index, value in enumerate(node.inputs):
                    if value in self._host and index not in ON_HOST.get(node.op_type, ()):
                        copy = self._on_device(value, node)  # type: ignore[arg-type]
                        if copy is not None:
                            node.replace_input_with(index, copy)
        return on_host

    def _on_cpu(self, node: ir.Node) -> bool:
        """Whether ONNX Runtime leaves a node to the CPU since all it reads is there."""
        read = [value for value in node.inputs if value is not None]
        wanted = ON_HOST.get(node.op_type, ())
        for index, value in enumerate(node.inputs):
            if value is None or _is_small_constant(value):
                continue
            if value not in self._host or index in wanted:
                return False
        return any(value in self._host for value in read)

    def _on_device(self, value: ir.Value, before: ir.Node) -> ir.Value | None:
        """A value of host memory computed on the device; None: not in this way."""
        if value not in self._host:
            return value
        if value not in self._copies:
            self._copies[value] = self._copy(value)
        return self._copies[value]

    def _copy(self, value: ir.Value) -> ir.Value | None:
        producer = value.producer()
        dtype, shape = self._known.get(str(value.name), (None, ()))
        if producer is None or dtype is None:
            return None
        if dtype in _WHOLE:
            if set(shape) - {1}:
                return None
            value.dtype = dtype
            return self._written(value, producer, len(shape))
        if any(a.type == ir.AttributeType.GRAPH for a in producer.attributes.values()):
            return None
        inputs: list[ir.Value | None] = []
        for item in producer.inputs:
            copy = item if item is None else self._on_device(item, producer)
            if item is not None and copy is None:
                return None
            inputs.append(copy)
        after = max(
            (p for item in inputs if item is not None and (p := item.producer()) is not None),
            key=list(self._graph).index,
        )
        index = list(producer.outputs).index(value)
        node = ir.Node(
            producer.domain,
            producer.op_type,
            inputs,
            list(producer.attributes.values()),
            num_outputs=len(producer.outputs),
            name=f"{producer.name}/on_device",
        )
        for old, new in zip(producer.outputs, node.outputs, strict=True):
            new.name, new.type, new.shape = f"{old.name}/on_device", old.type, old.shape
        self._graph.insert_after(after, node)
        return node.outputs[index]

    def _written(self, value: ir.Value, producer: ir.Node, rank: int) -> ir.Value:
        """``Range(n, n + 1, 1)`` in the shape of ``value``, which has one element."""
        assert value.dtype is not None
        name = f"{value.name}/on_device"
        number = value
        nodes = []
        if rank:
            flat = self._constant(f"{name}/scalar", np.array([], np.int64))
            nodes.append(ir.node("Reshape", [value, flat], name=f"{name}/Reshape"))
            number = nodes[-1].outputs[0]
            number.name = f"{name}/Reshape"
            number.type, number.shape = value.type, ir.Shape(())
        one = self._constant(f"{name}/one", np.array(1, value.dtype.numpy()))
        nodes.append(ir.node("Add", [number, one], name=f"{name}/Add"))
        end = nodes[-1].outputs[0]
        end.name, end.type, end.shape = f"{name}/Add", value.type, ir.Shape(())
        nodes.append(ir.node("Range", [number, end, one], name=f"{name}/Range"))
        result = nodes[-1].outputs[0]
        result.name, result.type, result.shape = f"{name}/Range", value.type, ir.Shape((1,))
        if rank != 1:
            sizes = self._constant(f"{name}/shape", np.ones(rank, np.int64))
            nodes.append(ir.node("Reshape", [result, sizes], name=f"{name}/shaped"))
            result = nodes[-1].outputs[0]
            result.name, result.type, result.shape = name, value.type, ir.Shape((1,) * rank)
        self._graph.insert_after(producer, nodes)
        return result

    def _constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        value = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
            const_value=ir.tensor(array, name=name),
        )
        self._graph.initializers[name] = value
        return value


def _is_small_constant(value: ir.Value) -> bool:
    return value.is_initializer() and (
        value.const_value is not None and value.const_value.size <= _SMALL
    )
