"""float16 graphs in float32 with its roundings, and normalizations of mixed dtypes."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export._compat.inductor import on_device
from sam_export.lower.float16_rounding import rounded_to_float16, rounding_to_float16
from sam_export.lower.mixed_norms import WEIGHT, norms_in_float32

EDGES = [0.0, -0.0, 1.0001, 65504.0, 65519.0, 65520.0, -65520.0, 1e9, 6e-8, 2.9e-8, 3.1e-8, -1e-9]
EDGES += [float("inf"), float("-inf"), float("nan"), 2049.0, 2051.0, 1e-5, -3.14159]


def test_the_rounding_is_that_of_a_cast() -> None:
    x = torch.tensor(EDGES)
    assert torch.equal(
        rounded_to_float16(x).nan_to_num(nan=7.0), x.half().float().nan_to_num(nan=7.0)
    )


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_onnx_runtime_keeps_it(level: str) -> None:
    """Between two products; with only the casts, the product before is not rounded."""

    def found(barrier: bool) -> Any:
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([len(EDGES)]))
        two = ir.node("Constant", [], {"value": ir.tensor(np.array([3.0], np.float32))})
        product = ir.node("Mul", [x, two.outputs[0]])
        half = ir.node("Cast", [product.outputs[0]], {"to": int(ir.DataType.FLOAT16)})
        kept = ir.node("Max" if barrier else "Identity", [half.outputs[0]])
        wide = ir.node("Cast", [kept.outputs[0]], {"to": int(ir.DataType.FLOAT)})
        last = ir.node("Mul", [wide.outputs[0], two.outputs[0]])
        last.outputs[0].name = "y"
        last.outputs[0].type, last.outputs[0].shape = x.type, x.shape
        nodes = [two, product, half, kept, wide, last]
        graph = ir.Graph([x], last.outputs, nodes=nodes, opset_imports={"": 18}, name="g")
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": np.array(EDGES, np.float32)})[0]

    expected = ((torch.tensor(EDGES) * 3.0).half().float() * 3.0).numpy()
    np.testing.assert_array_equal(found(barrier=True), expected)


class Chain(nn.Module):
    """Elementwise operators, a reduction, a softmax, a constant and views, all in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        h = torch.sigmoid(h * 300.0) + torch.full_like(h, 0.3) * h.t().reshape(h.shape)
        return h.exp().softmax(1, dtype=h.dtype) + h.amax(1, keepdim=True)


def captured(model: nn.Module, shape: tuple[int, ...]) -> Any:
    torch.manual_seed(0)
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    loss = nn.CrossEntropyLoss()
    step = sx.TrainStep(model, loss, sam, autocast=torch.float16, loss_scaling=sx.LossScaling(64.0))
    return sx.capture(step, (torch.randn(shape), torch.randint(2, shape[:1])), dynamic=None)


def test_a_graph_has_no_float16_inside_and_the_same_results() -> None:
    made = captured(Chain(), (6, 6))
    program = made.programs["evaluate"]
    plain = rounding_to_float16(program)
    values = [n.meta.get("val") for n in plain.graph.nodes]
    assert not any(isinstance(v, Tensor) and v.dtype == torch.float16 for v in values)
    assert any(
        v.meta["val"].dtype == torch.float16 for v in program.graph.nodes if v.op != "output"
    )
    x = torch.randn(6, 6)
    given = [torch.from_numpy(made.state[n]) if n in made.state else x
             for n in made.contract.program("evaluate").inputs]  # fmt: skip
    device = torch.device("cpu")
    one = on_device(program, device)(*given)[0]
    other = on_device(plain, device)(*given)[0]
    # Products add up in another order; everything else is the same to the bit.
    assert float((one - other).abs().max()) <= 2 * torch.finfo(torch.float16).eps
    assert torch.equal(other.half().float(), other)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norms = nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
        self.last = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norms(self.conv(x)))


def test_normalizations_keep_their_statistics_in_float32() -> None:
    made = captured(Norms(), (5, 1, 4, 4))
    program = made.programs["step"]
    rewritten = norms_in_float32(program)

    def norms(graph: torch.fx.Graph) -> list[torch.fx.Node]:
        return [node for node in graph.nodes if node.target in WEIGHT]

    assert len(norms(rewritten.graph)) == len(norms(program.graph)) == 12
    for node in norms(rewritten.graph):
        for part in node.users:
            assert part.target is operator.getitem
            assert part.meta["val"].dtype == torch.float32
        assert all(a.meta["val"].dtype != torch.float16 for a in node.all_input_nodes)
    assert any(
        part.meta["val"].dtype == torch.float16 for n in norms(program.graph) for part in n.users
    )
    spec = made.contract.program("step")
    torch.manual_seed(1)
    rest = {
        "hyper.lr": torch.tensor([0.1], dtype=torch.float64),
        "hyper.rho": torch.tensor([0.05], dtype=torch.float64),
    }
    batch = iter((torch.randn(5, 1, 4, 4), torch.randint(2, (5,))))
    given = [
        torch.from_numpy(made.state[n])
        if n in made.state
        else rest[n]
        if n in rest
        else next(batch)
        for n in spec.inputs
    ]
    device = torch.device("cpu")
    results = [on_device(p, device)(*given) for p in (program, rewritten)]
    for output, one, other in zip(spec.outputs, *results, strict=True):
        size = float(one.float().norm())
        error = float((one.float() - other.float()).norm())
        if output.name != "next.conv.bias":
            assert error <= 8 * torch.finfo(torch.float16).eps * size, output.name
