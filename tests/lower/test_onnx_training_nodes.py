"""Nodes on which the native runtime ends the process are refused before a model is written."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest
from onnx import TensorProto, helper

from sam_export.errors import LoweringError
from sam_export.lower.onnx_artifact import checked
from sam_export.lower.onnx_training_nodes import check_training_nodes

FLOAT = TensorProto.FLOAT


def softmax_gradient() -> onnx.ModelProto:
    """``dx = Identity(SoftmaxGrad_13(dy, y))``."""
    tensors = [helper.make_tensor_value_info(name, FLOAT, [2, 3]) for name in ("dy", "y", "dx")]
    node = helper.make_node(
        "SoftmaxGrad_13", ["dy", "y"], ["inner"], "softmax", domain="com.microsoft", axis=-1
    )
    graph = helper.make_graph(
        [node, helper.make_node("Identity", ["inner"], ["dx"], "result")],
        "graph",
        tensors[:2],
        tensors[2:],
        value_info=[helper.make_tensor_value_info("inner", FLOAT, [2, 3])],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def test_a_right_node_passes() -> None:
    check_training_nodes(softmax_gradient())
    assert checked("step.onnx", softmax_gradient())


def _more_inputs(node: onnx.NodeProto) -> None:
    node.input.append("y")


def _missing_input(node: onnx.NodeProto) -> None:
    node.input[1] = ""


def _more_outputs(node: onnx.NodeProto) -> None:
    node.output.append("more")


def _no_outputs(node: onnx.NodeProto) -> None:
    node.output[0] = ""


def _unknown_attribute(node: onnx.NodeProto) -> None:
    node.attribute.append(helper.make_attribute("axes", 1))


def _attribute_of_another_kind(node: onnx.NodeProto) -> None:
    node.attribute[0].CopyFrom(helper.make_attribute("axis", 1.0))


def _unknown_operator(node: onnx.NodeProto) -> None:
    node.op_type = "IsAllFinite"


def _other_domain(node: onnx.NodeProto) -> None:
    node.domain = "ai.onnx.contrib"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_more_inputs, "has 3 inputs, not 2"),
        (_missing_input, "lacks its input 1"),
        (_more_outputs, "has 2 outputs, not 1 to 1"),
        (_no_outputs, "has 1 outputs, not 1 to 1"),
        (_unknown_attribute, "has an attribute 'axes'"),
        (_attribute_of_another_kind, "has an attribute 'axis'"),
        (_unknown_operator, "is not an operator that this target may use"),
        (_other_domain, "is not an operator that this target may use"),
    ],
)
def test_a_wrong_node_is_named(change: Callable[[onnx.NodeProto], None], message: str) -> None:
    model = softmax_gradient()
    change(model.graph.node[0])
    with pytest.raises(LoweringError, match=message) as raised:
        checked("step.onnx", model)
    assert "'softmax'" in str(raised.value)


def test_a_result_without_a_declared_shape_is_refused() -> None:
    model = softmax_gradient()
    model.graph.value_info[0].type.tensor_type.ClearField("shape")
    with pytest.raises(LoweringError, match="'inner', whose dtype and shape are not declared"):
        check_training_nodes(model)


def test_a_domain_that_is_not_imported_is_refused() -> None:
    model = softmax_gradient()
    del model.opset_import[1]
    with pytest.raises(LoweringError, match="is not an operator that this target may use"):
        check_training_nodes(model)


def test_another_version_of_the_domain_is_refused() -> None:
    model = softmax_gradient()
    model.opset_import[1].version = 18
    with pytest.raises(LoweringError, match=r"com\.microsoft is imported in version 18"):
        check_training_nodes(model)


def test_nodes_of_branches_are_checked_too() -> None:
    model = softmax_gradient()
    branch = helper.make_graph(list(model.graph.node), "branch", [], list(model.graph.output))
    condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [])
    outer = helper.make_node(
        "If", ["condition"], ["dx"], "choice", then_branch=branch, else_branch=branch
    )
    model.graph.input.append(condition)
    del model.graph.node[:]
    model.graph.node.append(outer)
    with pytest.raises(LoweringError, match="'inner', whose dtype and shape are not declared"):
        check_training_nodes(model)
