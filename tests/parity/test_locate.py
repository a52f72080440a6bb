"""The first node that differs: real faults are put into graphs, and have to be found as such."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import sam_export as sx
from sam_export.artifact.folder import LoweredFile, write_artifact
from sam_export.errors import ParityError
from sam_export.lower import torchscript_in_place
from sam_export.lower.onnx_ops.table import FORMS
from sam_export.lower.registry import lower
from sam_export.lower.torchscript_source import GraphWriter
from sam_export.parity import locate_onnx
from sam_export.parity.blame import blame
from sam_export.parity.interpret import StepGraph
from sam_export.parity.locate import Location, locate
from sam_export.parity.locate_search import Search
from sam_export.parity.locate_torch import BACKENDS
from sam_export.parity.tolerances import Tolerances


class Net(nn.Module):
    """Linear, normalized, gelu, linear; with a skip connection, so that values have two readers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.activation = nn.GELU()
        self.drop = nn.Dropout(dropout)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))
        hidden = hidden + self.second(self.drop(self.activation(hidden)))  # the line with gelu
        logits: Tensor = self.head(hidden)
        return logits


def made(
    optimizer: Callable[..., Any] = torch.optim.Adam,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
) -> tuple[sx.CapturedStep, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Net(dropout).to(dtype)
    step = sx.TrainStep(
        model, nn.CrossEntropyLoss(), sx.SAM(model.parameters(), optimizer, rho=0.05, lr=0.01)
    )
    batch = (torch.randn(12, 6, dtype=dtype), torch.randint(0, 3, (12,)))
    return sx.capture(step, batch), batch


def node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    (found,) = [item for item in graph.node if item.name == name]
    return found


def tampered(
    captured: sx.CapturedStep, path: Path, change: Callable[[onnx.ModelProto], None]
) -> Path:
    """An artifact whose ``step.onnx`` is changed, as if the lowering had written it so."""
    lowered = lower(captured, "onnx")
    model = onnx.load_from_string(lowered.files["step"].data)
    change(model)
    file = LoweredFile("step.onnx", model.SerializeToString(deterministic=True))
    write_artifact(dataclasses.replace(lowered, files={**lowered.files, "step": file}), path)
    return path


def reproduced(folder: str | None) -> tuple[int, str]:
    """Exit code and output of a reproduction, run where this package cannot be imported."""
    assert folder is not None
    (Path(folder) / "sam_export.py").write_text("raise ImportError('not self-contained')")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "reproduce.py"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment
    )
    return done.returncode, done.stdout + done.stderr


def test_nothing_differs() -> None:
    captured, batch = made(dropout=0.3)
    location = locate(captured, "onnx", batch)
    assert location.verdict == "equal"
    assert not location.found
    assert "nothing differs" in str(location)


def test_a_wrong_form_of_an_operator_is_found_with_its_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = torch.ops.aten.gelu_backward.default
    right = FORMS[target]

    def wrong(gradient: Any, x: Any, approximate: str = "none") -> Any:
        from onnxscript import opset18 as op

        return op.Mul(right(gradient, x, approximate), op.Constant(value_float=1.001))

    wrong.__annotations__ = {}
    monkeypatch.setitem(FORMS, target, wrong)
    captured, batch = made()
    location = locate(captured, "onnx", batch, out=tmp_path / "found")
    assert location.verdict == "node"
    assert location.op == "aten::gelu_backward"
    assert location.node == "gelu_backward"  # of the two, the one of the first pass
    assert (location.stage, location.module) == ("ascent", "activation")
    assert "the line with gelu" in location.line
    assert "form of aten::gelu_backward" in location.fault.fault
    assert location.fault.ways["DISABLE_ALL"] is False
    assert location.gap is not None
    assert location.gap.relative == pytest.approx(1e-3, rel=0.01)
    code, text = reproduced(location.reproduction)
    assert code == 1, text
    assert "DIFFERS" in text
    assert len(onnx.load(tmp_path / "found" / "graph.onnx").graph.node) < 30


def test_a_changed_node_in_the_middle_is_found_and_named(tmp_path: Path) -> None:
    captured, batch = made()

    def change(model: onnx.ModelProto) -> None:
        node(model.graph, "descent/Add").op_type = "Sub"

    artifact = tampered(captured, tmp_path / "artifact", change)
    location = locate(captured, "onnx", batch, artifact=artifact, out=tmp_path / "found")
    assert location.verdict == "node"
    assert (location.op, location.stage) == ("aten::add.Tensor", "descent")
    assert location.onnx_nodes == ("descent/Add",)
    assert location.fault.changed == ("descent/Add",)
    assert location.fault.fault.startswith("the file")
    assert "perturbed_loss" in location.differing
    assert "loss" not in location.differing
    # With the right operator in its place, the reproduction says that it is gone.
    assert reproduced(location.reproduction)[0] == 1
    path = tmp_path / "found" / "graph.onnx"
    model = onnx.load(path)
    node(model.graph, "descent/Add").op_type = "Add"
    onnx.save(model, path)
    code, text = reproduced(location.reproduction)
    assert code == 0, text


def test_a_changed_constant_of_the_update_branch_is_found(tmp_path: Path) -> None:
    captured, batch = made()

    def change(model: onnx.ModelProto) -> None:
        (branch,) = [
            a.g for a in node(model.graph, "update/If").attribute if a.name == "then_branch"
        ]
        wrong = next(
            c
            for c in model.graph.initializer
            if numpy_helper.to_array(c).tolist() == 0.999
            or (c.data_type == 1 and abs(float(numpy_helper.to_array(c).ravel()[0]) - 0.999) < 1e-6)
        )
        reader = next(n for n in branch.node if wrong.name in n.input)
        assert reader.op_type == "Mul"
        new = numpy_helper.from_array(numpy_helper.to_array(wrong) * 0.9, "wrong")
        model.graph.initializer.append(new)
        for index, name in enumerate(reader.input):
            if name == wrong.name:
                reader.input[index] = "wrong"

    artifact = tampered(captured, tmp_path / "artifact", change)
    state = locate_state(captured)
    location = locate(captured, "onnx", batch, state=state, artifact=artifact)
    assert location.verdict == "node"
    assert (location.stage, location.op) == ("update", "aten::mul.Tensor")
    assert location.line == ""
    assert location.differing[0].startswith("next.")


def locate_state(captured: sx.CapturedStep) -> dict[str, np.ndarray[Any, Any]]:
    """A state in which every slot counts."""
    rng = np.random.default_rng(0)
    return {
        name: np.abs(rng.normal(size=value.shape)).astype(value.dtype)
        if name.startswith("slot.exp")
        else value
        for name, value in captured.state.items()
    }


def test_float64_finds_an_error_of_a_float32_constant(tmp_path: Path) -> None:
    captured, batch = made(dtype=torch.float64)

    def change(model: onnx.ModelProto) -> None:
        for item in model.graph.initializer:
            value = numpy_helper.to_array(item)
            if value.dtype == np.float64 and value.size == 1 and value.ravel()[0] == 0.1:
                item.CopyFrom(numpy_helper.from_array(value.astype("f4").astype("f8"), item.name))
                return
        raise AssertionError("BatchNorm's momentum is not there")

    artifact = tampered(captured, tmp_path / "artifact", change)
    location = locate(captured, "onnx", batch, artifact=artifact)
    assert location.verdict == "node"
    assert location.module == "norm"
    assert location.gap is not None
    assert location.gap.relative < 1e-7


def test_torchscript_source_that_is_wrong_is_blamed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = GraphWriter._call

    def wrong(self: GraphWriter, target: Any, node: torch.fx.Node) -> str:
        text = right(self, target, node)
        return f"{text} * 1.001" if "gelu_backward" in str(target) else text

    captured, batch = made(torch.optim.SGD)
    assert locate(captured, "torchscript", batch).verdict == "equal"
    monkeypatch.setattr(GraphWriter, "_call", wrong)
    location = locate(captured, "torchscript", batch, out=tmp_path / "found")
    assert (location.verdict, location.node) == ("node", "gelu_backward")
    assert location.fault.ways == {"without overwriting": False, "with overwriting": False}
    assert reproduced(location.reproduction)[0] == 1


def test_torchscript_that_overwrites_the_wrong_operand_is_blamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``a - b`` written over ``b`` is ``b - a``: it differs in pieces with both nodes only."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6))
            self.shift = nn.Parameter(torch.randn(3, 6))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight - self.shift * self.shift)

    model = Shifted()
    optimizer = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.01)
    batch = (torch.randn(5, 6), torch.randint(0, 3, (5,)))
    captured = sx.capture(sx.TrainStep(model, nn.CrossEntropyLoss(), optimizer), batch)
    commutative = torchscript_in_place._COMMUTATIVE | {torch.ops.aten.sub.Tensor}
    monkeypatch.setattr(torchscript_in_place, "_COMMUTATIVE", commutative)
    location = locate(captured, "torchscript", batch)
    assert location.verdict == "together"
    assert "aten::sub" in location.op
    assert location.fault.ways == {"without overwriting": True, "with overwriting": False}
    assert "written over" in location.fault.fault


def corrupting(module: torch.fx.GraphModule, inputs: Any) -> Any:
    """A backend of torch.compile that takes every gelu_backward twice."""
    for item in module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.gelu_backward.default
    ):
        with module.graph.inserting_after(item):
            double = module.graph.call_function(torch.ops.aten.mul.Tensor, (item, 2.0))
        item.replace_all_uses_with(double, delete_user_cb=lambda user, d=double: user is not d)
    module.recompile()
    return module.forward


def test_a_backend_of_torch_compile_that_is_wrong_is_blamed(tmp_path: Path) -> None:
    torch._dynamo.register_backend(corrupting, "corrupting")
    captured, batch = made()
    location = locate(
        captured,
        "torch-compile",
        batch,
        backends=("eager", "aot_eager", "corrupting"),
        out=tmp_path / "found",
    )
    assert location.verdict == "node"
    assert (location.node, location.module) == ("gelu_backward", "activation")
    assert "the line with gelu" in location.line
    assert location.fault.ways == {"eager": True, "aot_eager": True, "corrupting": False}
    assert "corrupting" in location.fault.fault
    script = tmp_path / "found" / "reproduce.py"
    script.write_text(script.read_text().replace("'corrupting'", "'aot_eager'"))
    code, text = reproduced(location.reproduction)
    assert code == 0, text


def test_what_cannot_be_looked_for_is_said(tmp_path: Path) -> None:
    captured, batch = made()
    with pytest.raises(ParityError, match="ort-artifacts"):
        locate(captured, "ort-artifacts", batch)
    with pytest.raises(ParityError, match="there already"):
        locate(captured, "onnx", batch, out=tmp_path)
    other, _ = made(torch.optim.SGD)
    sx.export(other, tmp_path / "other")
    with pytest.raises(ParityError, match="not this step"):
        locate(captured, "onnx", batch, artifact=tmp_path / "other")


@pytest.mark.parametrize("target", ["onnx", "onnx-training"])
def test_an_artifact_for_cuda_is_not_searched_on_the_cpu(tmp_path: Path, target: str) -> None:
    """Its kernels are others: that nothing differs here would say nothing about it."""
    captured, batch = made(torch.optim.SGD)
    artifact = sx.export(captured, tmp_path / "cuda", target=target, device="cuda")
    with pytest.raises(ParityError, match="made for 'cuda'"):
        locate(captured, target, batch, artifact=artifact)


def test_a_location_is_json(tmp_path: Path) -> None:
    import json

    location = Location("onnx", "equal")
    assert json.loads(json.dumps(location.to_dict()))["verdict"] == "equal"


def test_only_the_optimizer_of_onnx_runtime_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A level of optimization that is wrong: the levels below it agree, and so does the file."""
    right = locate_onnx.run_model

    def wrong(model: Any, inputs: Any, level: str, is_double: bool) -> Any:
        results = right(model, inputs, level, is_double)
        if level in ("EXTENDED", "ALL"):
            names = [output.name for output in model.graph.output]
            results = [
                r * np.float32(1.01) if name == "perturbed_loss" else r
                for name, r in zip(names, results, strict=True)
            ]
        return results

    monkeypatch.setattr(locate_onnx, "run_model", wrong)
    captured, batch = made()
    graph = StepGraph(captured, batch)
    form = locate_onnx.OnnxForm(graph, None, "onnx")
    piece = Search(graph, form, Tolerances()).find()
    assert piece is not None
    assert piece.span == (graph.results["perturbed_loss"],)
    verdict = blame(graph, form, piece, Tolerances())
    assert verdict.fault == "ONNX Runtime's optimizer (from level extended on)"
    assert verdict.ways["BASIC"] is True
    assert verdict.ways["ALL"] is False


@pytest.mark.wide
def test_a_node_of_three_thousand_is_found_within_two_minutes(tmp_path: Path) -> None:
    from models.vit import recipe

    step, batches = recipe(optimizer="adam", batch_size=8)
    captured = sx.capture(step, batches[0])
    assert len(captured.programs["step"].graph.nodes) > 2800
    wrong = []

    def change(model: onnx.ModelProto) -> None:
        adds = [n for n in model.graph.node if n.op_type == "Add" and n.name.startswith("descent/")]
        adds[len(adds) // 2].op_type = "Sub"
        wrong.append(adds[len(adds) // 2].name)

    artifact = tampered(captured, tmp_path / "artifact", change)
    location = locate(captured, "onnx", batches[0], artifact=artifact, out=tmp_path / "found")
    assert location.verdict == "node"
    assert location.onnx_nodes == tuple(wrong)
    assert location.seconds < 120
    assert reproduced(location.reproduction)[0] == 1


@pytest.mark.wide
def test_inductor_agrees_piece_by_piece() -> None:
    captured, batch = made()
    assert locate(captured, "torch-compile", batch).verdict == "equal"
    assert locate(captured, "torch-compile", batch, backends=BACKENDS).verdict == "equal"
    assert locate(captured, "aot-inductor", batch).verdict == "equal"
