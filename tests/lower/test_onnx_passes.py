"""Every pass: it keeps its contract, the results, and says truly whether it changed the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

import sam_export as sx
from sam_export._compat import onnx_exporter
from sam_export.lower.onnx_graph import OPSET
from sam_export.lower.onnx_ops import DECOMPOSED, FORMS, OWN_DECOMPOSITIONS
from sam_export.lower.onnx_passes import PASSES, simplify
from sam_export.lower.onnx_passes.common_subexpressions import CommonSubexpressions
from sam_export.lower.onnx_passes.constants import FoldConstants, ShareConstants
from sam_export.lower.onnx_passes.copies import RemoveCopies
from sam_export.lower.onnx_passes.dead_code import RemoveDeadCode
from sam_export.lower.onnx_passes.inlining import Inline


@pytest.fixture(scope="module")
def raw() -> bytes:
    """A step as the exporter writes it, before any pass, in float64."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 7), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(7, 3)).double()
    sam = sx.SAM(model.parameters(), torch.optim.AdamW, lr=0.1, weight_decay=0.1)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(label_smoothing=0.1), sam)
    batch = (torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 1]))
    captured = sx.capture(step, batch)
    program = onnx_exporter.decomposed(
        captured.programs["step"], OPSET, FORMS, DECOMPOSED, OWN_DECOMPOSITIONS, {}, ValueError
    )
    spec = captured.contract.program("step")
    outputs = [output.name for output in spec.outputs]
    model_ir = onnx_exporter.to_onnx(program, list(spec.inputs), outputs, OPSET, FORMS)
    model_ir.ir_version = 10
    return written(model_ir)


def written(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def read(data: bytes) -> ir.Model:
    import onnx

    return ir.from_proto(onnx.load_from_string(data))


def results(data: bytes) -> list[Any]:
    """With no optimization of the runtime's own, and the same random inputs each time."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(data, options)
    rng = np.random.default_rng(0)
    fed = {}
    for item in session.get_inputs():
        shape = [4 if isinstance(size, str) else size for size in item.shape]
        values = rng.random(shape)
        fed[item.name] = values.astype(np.int64 if item.type == "tensor(int64)" else np.float64)
    found: list[Any] = session.run(None, fed)
    return found


def test_each_pass_keeps_the_results_and_tells_the_truth(raw: bytes) -> None:
    expected = results(raw)
    model = read(raw)
    for step in PASSES:
        before = written(model)
        changed = step(model).modified
        after = written(model)
        name = type(step).__name__
        assert changed == (before != after), name
        for found, wanted in zip(results(after), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14, err_msg=name)
        again = step(model).modified
        assert not again, name
        assert written(model) == after, name
    assert len(list(model.graph)) < 0.6 * len(list(read(raw).graph))


def test_the_same_graph_gives_the_same_bytes(raw: bytes) -> None:
    models = [read(raw), read(raw)]
    for model in models:
        for step in PASSES:
            step(model)
    assert written(models[0]) == written(models[1])


def graph(nodes: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    names = iter(range(100))
    for node in nodes:
        for value in node.outputs:
            value.name = value.name or f"v{next(names)}"
    whole = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 18}, name="test")
    return ir.Model(whole, ir_version=10)


def tensor(name: str, *shape: int) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def test_transposes_in_pairs_become_one_or_none() -> None:
    x = tensor("x", 2, 3, 4)
    turned = ir.node("Transpose", [x], {"perm": [1, 2, 0]})
    back = ir.node("Transpose", [turned.outputs[0]], {"perm": [2, 0, 1]})
    again = ir.node("Transpose", [turned.outputs[0]], {"perm": [0, 2, 1]})
    total = ir.node("Relu", [back.outputs[0]])
    model = graph([turned, back, again, total], [x], [total.outputs[0], again.outputs[0]])
    assert RemoveCopies()(model).modified
    assert total.inputs[0] is x
    assert again.inputs[0] is x
    assert list(again.attributes["perm"].as_ints()) == [1, 0, 2]


def test_a_reshape_that_copies_a_size_stays_behind_its_reshape() -> None:
    x = tensor("x", 2, 6)
    flat = ir.val("flat", const_value=ir.tensor(np.array([3, 4])))
    copied = ir.val("copied", const_value=ir.tensor(np.array([0, 2, 2])))
    first = ir.node("Reshape", [x, flat])
    second = ir.node("Reshape", [first.outputs[0], copied])
    third = ir.node("Reshape", [first.outputs[0], flat])
    model = graph([first, second, third], [x], [second.outputs[0], third.outputs[0]])
    model.graph.initializers["flat"] = flat
    model.graph.initializers["copied"] = copied
    assert RemoveCopies()(model).modified
    assert second.inputs[0] is first.outputs[0]
    assert third.inputs[0] is x


def test_an_output_keeps_its_node() -> None:
    x = tensor("x", 2, 3)
    x.dtype = ir.DataType.FLOAT
    same = ir.node("Cast", [x], {"to": ir.DataType.FLOAT.value})
    model = graph([same], [x], [same.outputs[0]])
    RemoveCopies()(model)
    assert [node.op_type for node in model.graph] == ["Cast"]


def test_what_makes_an_output_keeps_its_name() -> None:
    """Transposes in pairs at the end of a graph are nothing, too: what they move is the output."""
    x = tensor("x", 2, 3)
    relu = ir.node("Relu", [x])
    turned = ir.node("Transpose", [relu.outputs[0]], {"perm": [1, 0]})
    back = ir.node("Transpose", [turned.outputs[0]], {"perm": [1, 0]})
    other = ir.node("Neg", [back.outputs[0]])
    back.outputs[0].name = "gradient"
    model = graph([relu, turned, back, other], [x], [back.outputs[0], other.outputs[0]])
    simplify(model)
    assert [node.op_type for node in model.graph] == ["Relu", "Neg"]
    assert model.graph.outputs[0] is relu.outputs[0]
    assert relu.outputs[0].name == "gradient"
    assert other.inputs[0] is relu.outputs[0]


def test_two_outputs_of_one_value_stay_two() -> None:
    x = tensor("x", 2, 3)
    relu = ir.node("Relu", [x])
    same = ir.node("Transpose", [relu.outputs[0]], {"perm": [0, 1]})
    same.outputs[0].name = "copy"
    model = graph([relu, same], [x], [relu.outputs[0], same.outputs[0]])
    RemoveCopies()(model)
    assert [value.name for value in model.graph.outputs] == [relu.outputs[0].name, "copy"]


def test_contracts_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that a pass cannot take, and a pass that does not do what it promises."""
    x = tensor("x", 2)
    noise = ir.node("RandomNormalLike", [x])
    twice = ir.node("Add", [noise.outputs[0], x])
    unread = ir.node("Relu", [x])
    constant = ir.node("Constant", [], {"value": ir.tensor(np.ones(2, np.float32))})
    model = graph([noise, twice, unread, constant], [x], [twice.outputs[0]])
    with pytest.raises(ir.passes.PreconditionError, match="RandomNormalLike"):
        CommonSubexpressions()(model)

    def does_nothing(self: Any, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, False)

    for kind, message in ((RemoveDeadCode, "Nothing reads Relu"), (ShareConstants, "Constants")):
        monkeypatch.setattr(kind, "call", does_nothing)
        with pytest.raises(ir.passes.PostconditionError, match=message):
            kind()(model)
    y, z = tensor("y", 2), tensor("z", 2)
    turned = ir.node("Transpose", [y], {"perm": [0]})
    pair = ir.node("Transpose", [turned.outputs[0]], {"perm": [0]})
    monkeypatch.setattr(RemoveCopies, "call", does_nothing)
    with pytest.raises(ir.passes.PostconditionError, match="Transpose"):
        RemoveCopies()(graph([turned, pair], [y], [pair.outputs[0]]))
    function = ir.Function("own", "f", "", graph=ir.Graph([], [], nodes=[]), attributes=[])
    relu = ir.node("Relu", [z])
    with_function = graph([relu], [z], [relu.outputs[0]])
    with_function.functions[function.identifier()] = function
    for step in (CommonSubexpressions(), FoldConstants()):
        with pytest.raises(ir.passes.PreconditionError, match="Inline"):
            step(with_function)
    monkeypatch.setattr(Inline, "call", does_nothing)
    with pytest.raises(ir.passes.PostconditionError, match="own"):
        Inline()(with_function)
