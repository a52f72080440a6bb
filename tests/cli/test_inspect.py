"""``sam-export inspect``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sam_export.artifact.contract import StepContract
from sam_export.artifact.folder import open_artifact
from sam_export.cli import main, operators
from tests.cli.conftest import Workplace

onnx = pytest.importorskip("onnx")


def test_text(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(workplace.artifact)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "target onnx" in lines
    assert "hyper-parameters lr 0.1, rho 0.05" in lines
    assert "batch a tuple of input, target" in lines
    assert "symbolic sizes batch >= 1" in lines
    assert any(line.startswith("0.weight parameter float32[8, 4]") for line in lines)
    assert "input input float32[batch, 4]" in lines
    assert "next.0.weight parameter float32[8, 4] 0.weight" in lines
    assert any(line.startswith("semantics running_stats ascent") for line in lines)
    assert any(line.startswith("parameter 4 67 268 B") for line in lines)
    assert any(line.startswith("step step.onnx ") for line in lines)
    assert any(line.startswith("MatMul ") or line.startswith("Gemm ") for line in lines)


def test_json(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(workplace.artifact), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    artifact = open_artifact(workplace.artifact)
    assert StepContract.from_dict(values["contract"]) == artifact.contract
    assert values["semantics"] == artifact.semantics.to_dict()
    assert values["hyper"] == {"lr": [0.1], "rho": [0.05]}
    assert values["bytes"] == artifact.size
    assert values["versions"] == artifact.versions
    assert set(values["operators"]) == set(artifact.files)


def test_operators_in_subgraphs_and_functions_are_counted(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    def branch(op: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1])
        inner = helper.make_node("If", ["c"], ["out"], then_branch=leaf(op), else_branch=leaf(op))
        return helper.make_graph([inner], "branch", [], [out])

    def leaf(op: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info("deep", TensorProto.FLOAT, [1])
        return helper.make_graph([helper.make_node(op, ["x"], ["deep"])], "leaf", [], [out])

    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=branch("Relu"), else_branch=branch("Neg")),
        helper.make_node("Twice", ["y"], ["z"], domain="ours"),
    ]
    twice = helper.make_function(
        "ours",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 18)],
    )
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
        ],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])],
    )
    model = helper.make_model(graph, functions=[twice])
    onnx.save(model, tmp_path / "model.onnx")
    counts = operators.count_onnx(tmp_path / "model.onnx")
    assert counts == {"If": 3, "Relu": 2, "Neg": 2, "ours::Twice": 1, "Add": 1}


def test_without_onnx(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operators.importlib.util, "find_spec", lambda _: None)
    assert main(["inspect", str(workplace.artifact)]) == 0
    assert "Operators: counting them needs the package onnx: pip install onnx" in (
        capsys.readouterr().out
    )


def test_damaged_artifact(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(workplace.artifact, broken)
    data = bytearray((broken / "step.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (broken / "step.onnx").write_bytes(data)
    assert main(["inspect", str(broken)]) == 2
    captured = capsys.readouterr()
    assert "step.onnx is not the file that was written" in captured.err
    assert captured.out == ""


def test_no_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("torchscript", {"addmm": 4, "linalg_vector_norm": 10, "add_": 12}),
        ("onnx-training", {"com.microsoft::TanhGrad": 2}),
        ("ort-artifacts", {"com.microsoft::TanhGrad": 2}),
        ("torch-compile", {"addmm.default": 4, "linalg_vector_norm.default": 10}),
    ],
)
def test_operators_of_other_targets(
    target: str, expected: dict[str, int], workplace: Workplace, tmp_path: Path
) -> None:
    out = tmp_path / target
    argv = ["export", f"{workplace.recipe}:recipe", "--out", str(out), "--target", target]
    assert main(argv) == 0
    counted, reason = operators.operators_of(open_artifact(out))
    assert counted is not None, reason
    assert {name: counted["step"][name] for name in expected} == expected
    assert counted["evaluate"].total() < counted["step"].total()


def test_where_the_stock_training_api_keeps_the_state(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "artifact"
    argv = ["export", f"{workplace.recipe}:recipe", "--out", str(out), "--target", "ort-artifacts"]
    assert main(argv) == 0
    assert main(["inspect", str(out)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "gradient buffers hold: direction" in lines
    assert "stock optimizer: SGDOptimizerV2" in lines
    assert any(line.endswith("which the stock SGD does not have") for line in lines)
    assert "0.weight parameter float32[8, 4] has a gradient buffer" in lines
    assert any("slot.momentum_buffer.0.weight" in s and "updated in place" in s for s in lines)
