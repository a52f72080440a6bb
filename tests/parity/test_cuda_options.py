"""`check_parity(cuda=...)` as far as a machine without a GPU can follow it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sam_export as sx
from sam_export.errors import ParityError
from sam_export.parity import subjects
from tests.parity.cases import batches_for, step_of

CUDA = sx.CudaOptions(tf32=True, cuda_graph=True)


def test_on_another_device_they_are_refused() -> None:
    step, batches = step_of("mlp", "float32"), batches_for("mlp", "float32")
    with pytest.raises(ParityError, match=r"CudaOptions\(.*given with device='cpu'"):
        sx.check_parity(step, batches, targets=["onnx"], num_steps=1, cuda=CUDA)


@pytest.mark.parametrize("isolate", [True, False])
def test_they_go_to_the_session_and_into_the_report(
    isolate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Refused:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise sx.RuntimeUnavailableError("no device")

    def child(
        folder: Any, device: str, threads: int, draws: bool, hyper: Any, cuda: Any, in_stages: bool
    ) -> Any:
        asked.append((device, cuda))
        return Refused()

    def load(folder: Any, device: str, cuda: Any) -> Any:
        asked.append((device, cuda))
        return Refused()

    monkeypatch.setattr(subjects, "ChildSession", child)
    monkeypatch.setattr("sam_export.api.load", load)
    monkeypatch.setattr(subjects, "_close", lambda run: None)
    step, batches = step_of("mlp", "float32"), batches_for("mlp", "float32")
    report = sx.check_parity(
        step, batches, ["onnx"], num_steps=1, device="cuda", isolate=isolate, cuda=CUDA
    )
    assert asked == [("cuda", CUDA)]
    assert not report.ok
    assert "no device" in str(report.targets[0].error)
    assert report.ledger["hardware"]["cuda_options"] == CUDA.to_dict()
    assert "cuda=CudaOptions(memory_limit=None, tf32=True, cuda_graph=True" in report.command


def test_without_a_device_the_target_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    step, batches = step_of("mlp", "float32"), batches_for("mlp", "float32")
    report = sx.check_parity(
        step, batches, ["torchscript"], num_steps=1, device="cuda", cuda=sx.CudaOptions()
    )
    assert "no CUDA device" in str(report.targets[0].error)
