"""The hand-written protobuf reader and writer, against the package ``onnx``."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sam_export.runtime import onnx_protobuf as pb


def model() -> onnx.ModelProto:
    """A graph with an ``If`` whose branch reads a value of the outer graph."""
    inner = helper.make_graph(
        [helper.make_node("Add", ["deep", "x"], ["sum"])],
        "inner",
        [],
        [helper.make_tensor_value_info("sum", TensorProto.DOUBLE, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["same"])],
        "other",
        [],
        [helper.make_tensor_value_info("same", TensorProto.DOUBLE, None)],
    )
    nodes = [helper.make_node("If", ["yes"], ["y"], then_branch=inner, else_branch=other)]
    graph = helper.make_graph(
        nodes,
        "outer",
        [
            helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["batch", 3]),
            helper.make_tensor_value_info("deep", TensorProto.DOUBLE, [1]),
            helper.make_tensor_value_info("unread", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)],
        [numpy_helper.from_array(np.arange(200.0), "constant")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def graph_bytes() -> bytes:
    field = pb.field_of(model().SerializeToString(), pb.MODEL_GRAPH)
    assert field is not None
    return bytes(field.message)


def test_all_fields_together_are_the_message() -> None:
    data = model().SerializeToString()
    assert b"".join(field.whole for field in pb.fields(data)) == data
    assert graph_bytes() == model().graph.SerializeToString()


def test_values_read_in_branches_are_read() -> None:
    assert pb.names_read(graph_bytes()) == {"yes", "x", "deep", "sum", "same", "y"}


def test_element_types_are_those_of_onnx() -> None:
    for name, number in pb.DTYPES.items():
        assert helper.np_dtype_to_tensor_dtype(np.dtype(name)) == number, name
        info = helper.make_tensor_value_info("x", number, [2])
        assert pb.dtype_of(info.SerializeToString()) == np.dtype(name)
    other = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [2])
    with pytest.raises(ValueError, match="element type 16"):
        pb.dtype_of(other.SerializeToString())


def test_the_first_cast_is_found_in_a_branch() -> None:
    made = model()
    branch = made.graph.node[0].attribute[0].g
    branch.node.append(helper.make_node("Cast", ["x"], ["c"], name="one", to=TensorProto.FLOAT))
    branch.node.append(helper.make_node("Cast", ["x"], ["d"], name="two", to=TensorProto.BFLOAT16))
    data = made.graph.SerializeToString()
    assert pb.first_cast_to(data, TensorProto.FLOAT) == "one"
    assert pb.first_cast_to(data, pb.BFLOAT16) == "two"
    assert pb.first_cast_to(data, TensorProto.INT64) is None


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**31, 2**63 - 1])
def test_numbers_are_written_as_protobuf_does(number: int) -> None:
    data = pb.number_field(pb.TENSOR_DIMS, number)
    assert list(TensorProto.FromString(data).dims) == [number]
    (field,) = pb.fields(data)
    assert (field.number, field.value) == (pb.TENSOR_DIMS, number)


def test_a_text_is_written_as_protobuf_does() -> None:
    name = "größe." + "x" * 300
    assert TensorProto.FromString(pb.bytes_field(pb.TENSOR_NAME, name)).name == name


def test_a_file_that_is_cut_off_or_another_one_is_refused() -> None:
    data = graph_bytes()
    for size in (1, 3, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match="cut off"):
            list(pb.fields(data[:size]))
    with pytest.raises(ValueError, match="unknown kind"):
        list(pb.fields(b"\x0b\x01"))
