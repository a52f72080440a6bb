"""The optimizer model of onnxruntime-training's own API."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper, numpy_helper

from sam_export.lower.onnx_graph import IR_VERSION, OPSET
from sam_export.lower.onnx_training_nodes import TRAINING_DOMAIN
from sam_export.lower.ort_artifacts_plan import Plan


def optimizer_model(plan: Plan, count: int, guarded: bool, device: str = "cpu") -> onnx.ModelProto:
    """The stock optimizer over the gradient buffers.

    With ``guarded``, one gradient that is not finite keeps every weight, every moment and the step
    number as they are: ``update = isfinite(sum of squares of all gradients)``, the third input of
    ``SGDOptimizerV2`` and the seventh of ``AdamWOptimizer``. The API gives the gradients as a
    sequence whose order is its own, so all of them are looked at.

    Args:
        plan: Operator and attributes.
        count: Number of trained parameters.
        guarded: Whether an update that is not finite is left out.
        device: ``cpu`` or ``cuda``. An input that no node reads counts as the CPU's, and SGD does
            not read the moments that the API hands it: on CUDA they would be copied to the host at
            each step, as much as the model has weights. There a node counts them.
    """
    adam = plan.optimizer == "AdamWOptimizer"
    sequences = ["params", "gradients", "first_order_moments"]  # SGD's moments are not used
    sequences += ["second_order_moments"] if adam else []
    inputs = [
        helper.make_tensor_value_info("learning_rate", TensorProto.FLOAT, [1]),
        helper.make_tensor_value_info("step", TensorProto.INT64, [1]),
        *(
            helper.make_tensor_sequence_value_info(name, TensorProto.FLOAT, None)
            for name in sequences
        ),
    ]
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    if guarded:
        nodes, constants = _finite(count)
    if device == "cuda" and not adam:
        moments, size = "first_order_moments", "count_of_moments"
        nodes.append(helper.make_node("SequenceLength", [moments], [size], size))
    given = ["learning_rate", "step", *sequences] if adam else ["learning_rate", *sequences[:2]]
    nodes.append(
        helper.make_node(
            plan.optimizer,
            [*given, "finite"] if guarded else given,
            ["updated"],
            plan.optimizer,
            domain=TRAINING_DOMAIN,
            **plan.attributes,
        )
    )
    # The schema of SGDOptimizerV2 says that it is a scalar; it has one element in one dimension.
    # ONNX Runtime warns of that when it loads the model; declared as a scalar, at every step.
    outputs = [helper.make_tensor_value_info("updated", TensorProto.BOOL, [1])]
    graph = helper.make_graph(nodes, "optimizer", inputs, outputs, constants)
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(TRAINING_DOMAIN, 1)],
        ir_version=IR_VERSION,
        producer_name="sam_export",
    )


def _finite(count: int) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    nodes, constants, sums = [], [], []
    for index in range(count):
        place, gradient, total = f"place_{index}", f"gradient_{index}", f"squares_{index}"
        constants.append(numpy_helper.from_array(_int64(index), place))
        nodes.append(helper.make_node("SequenceAt", ["gradients", place], [gradient], gradient))
        nodes.append(helper.make_node("ReduceSumSquare", [gradient], [total], total, keepdims=0))
        sums.append(total)
    nodes += [
        helper.make_node("Sum", sums, ["squares"], "squares"),
        helper.make_node("Sub", ["squares", "squares"], ["difference"], "difference"),
        helper.make_node("IsNaN", ["difference"], ["not_finite"], "not_finite"),
        helper.make_node("Not", ["not_finite"], ["finite_scalar"], "finite_scalar"),
        helper.make_node("Reshape", ["finite_scalar", "one"], ["finite"], "finite"),
    ]
    constants.append(numpy_helper.from_array(_int64([1]), "one"))
    return nodes, constants


def _int64(value: int | list[int]) -> object:
    import numpy as np

    return np.array(value, np.int64)
