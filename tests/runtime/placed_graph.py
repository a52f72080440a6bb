"""A graph with one of each kind of node that a session on CUDA leaves to the CPU, or copies for.

``placed/<version>.ort`` is what that version of ONNX Runtime makes of it with its CUDA provider
(onnxruntime-training 1.19.2, onnxruntime-gpu 1.31.1). To make one anew, on a machine where that
provider comes up: a session over `placed_graph()` with ``optimized_model_filepath`` set and
``session.save_model_format`` as ``ORT``, as `sam_export.runtime.placement.recorded` does it.
"""

from __future__ import annotations

from onnx import TensorProto, helper


def placed_graph() -> bytes:
    """``x`` is float32[n, 4], ``scale`` a scalar; the names say what becomes of the nodes."""

    def node(op: str, inputs: list[str], output: str, **attributes: object) -> object:
        return helper.make_node(op, inputs, [output], output, **attributes)

    def constant(name: str, kind: int, dims: list[int], values: list[float]) -> object:
        return helper.make_tensor(name, kind, dims, values)

    def branch(name: str, op: str) -> object:
        result = helper.make_tensor_value_info(f"{name}/result", TensorProto.FLOAT, None)
        return helper.make_graph([node(op, ["rows"], f"{name}/result")], name, [], [result])

    nodes = [
        # Sizes alone: harmless.
        node("Shape", ["x"], "shape"),
        node("Gather", ["shape", "zero"], "size"),
        node("Mul", ["size", "four"], "count"),
        node("Reshape", ["count", "one_dim"], "flat_shape"),
        node("Reshape", ["x", "flat_shape"], "flat"),
        # A size that meets a tensor.
        node("Cast", ["count"], "size_to_device", to=TensorProto.FLOAT),
        node("Div", ["flat", "size_to_device"], "divided"),
        # A size and an input.
        node("Cast", ["size"], "float_size", to=TensorProto.FLOAT),
        node("Mul", ["float_size", "scale"], "input_on_cpu"),
        node("Mul", ["divided", "input_on_cpu"], "rows"),
        # No kernel.
        node("Acosh", ["rows"], "no_kernel"),
        # A condition.
        node("ReduceSum", ["no_kernel"], "total", keepdims=0),
        node("Less", ["total", "limit"], "less"),
        node(
            "If",
            ["less"],
            "chosen",
            then_branch=branch("then", "Exp"),
            else_branch=branch("else", "Tanh"),
        ),
        # A result.
        node("Add", ["size", "four"], "size_as_output"),
    ]
    graph = helper.make_graph(
        nodes,
        "placed",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4]),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("size_as_output", TensorProto.INT64, None),
        ],
        [
            constant("zero", TensorProto.INT64, [], [0]),
            constant("four", TensorProto.INT64, [], [4]),
            constant("one_dim", TensorProto.INT64, [1], [1]),
            constant("limit", TensorProto.FLOAT, [], [3.0]),
        ],
    )
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())
