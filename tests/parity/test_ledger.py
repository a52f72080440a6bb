"""The determinism ledger says what is so, also when it is changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

import sam_export as sx
from sam_export.parity.ledger import ledger
from tests.parity.cases import batches_for, step_of


def test_switches_are_read_and_not_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("ORT_SOMETHING_TOKEN", "hush")
    monkeypatch.setenv("UNRELATED", "1")
    before = ledger(3, 7, "cpu", {"t": {"a": 1}})
    assert before["seeds"]["check"] == 3
    assert before["seeds"]["step_generator"] == 7
    assert before["targets"] == {"t": {"a": 1}}
    assert before["environment"]["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not {"ORT_SOMETHING_TOKEN", "UNRELATED"} & set(before["environment"])
    assert before["threads"]["torch"] == torch.get_num_threads()
    assert before["versions"]["torch"] == torch.__version__
    numerics = before["numerics"]
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        torch.use_deterministic_algorithms(True)
        # As a context, since `torch.testing` forbids to set the flag for good.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            now = ledger(3, 7, "cpu", {})["numerics"]
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(False)
    assert numerics["mkldnn_matmul_float32"] != "tf32"
    assert now["mkldnn_matmul_float32"] == "tf32"
    assert (numerics["cudnn_benchmark"], now["cudnn_benchmark"]) == (False, True)
    assert (numerics["deterministic_algorithms"], now["deterministic_algorithms"]) == (False, True)


def test_settings_that_older_ones_refuse_to_read() -> None:
    """torch's own getters raise after the first of them; the second is what a report needs."""
    precision = torch.get_float32_matmul_precision()
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        now = ledger(3, 7, "cpu", {})["numerics"]
    finally:
        # The older setting, after which the getter works again ("ieee" where there was "none").
        torch.set_float32_matmul_precision(precision)
    assert torch.get_float32_matmul_precision() == precision
    assert now["cuda_matmul_float32"] == "tf32"
    assert ledger(3, 7, "cpu", {})["numerics"]["cuda_matmul_float32"] != "tf32"


def test_flushed_denormals_are_noticed() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        assert not ledger(0, 0, "cpu", {})["numerics"]["torch_keeps_denormals"]
    finally:
        torch.set_flush_denormal(False)
    assert ledger(0, 0, "cpu", {})["numerics"]["torch_keeps_denormals"]


def test_a_session_tells_the_hash_of_its_graph_and_what_the_runtime_says(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    step = step_of("mlp", "float64")
    captured = sx.capture(step, batches_for("mlp", "float64")[0])
    sx.export(captured, tmp_path / "a", target="onnx")
    facts = sx.load(tmp_path / "a", threads=1).facts
    digest = hashlib.sha256((tmp_path / "a" / "step.onnx").read_bytes()).hexdigest()
    assert facts["graphs"]["step.onnx"] == digest
    assert facts["graph_optimization_level"] == "ORT_ENABLE_ALL"
    assert facts["intra_op_num_threads"] == 1
    assert facts["providers"] == ["CPUExecutionProvider"]
    assert "MatMulScaleFusion" in facts["disabled_optimizers"], "float64"


def test_a_report_has_the_facts_of_each_target() -> None:
    step = step_of("mlp", "float32")
    report = sx.check_parity(
        step, batches_for("mlp", "float32"), targets=["torchscript"], num_steps=1, seed=5
    )
    assert report.ok, str(report)
    (facts,) = report.ledger["targets"].values()
    assert len(facts["graphs"]["step.pt"]) == 64
    assert facts["threads"] == 1
    assert report.ledger["seeds"]["check"] == 5
    assert report.ledger["seeds"]["step_generator"] == step.seed
    assert report.command == (
        "sam_export.check_parity(step, batches, targets=['torchscript'], num_steps=1, "
        "device='cpu', seed=5)"
    )
