"""A graph for which ONNX Runtime lacks a kernel: the reason, and what to do, are said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sam_export as sx
from sam_export.errors import RuntimeUnavailableError

pytest.importorskip("onnxruntime")


def captured(kind: type[torch.optim.Optimizer], half: bool = False) -> sx.CapturedStep:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.a(x)
            return self.b(torch.tanh(hidden.bfloat16()).float() if half else torch.tanh(hidden))

    torch.manual_seed(0)
    model = Net()
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sx.SAM(model.parameters(), kind, lr=0.1))
    return sx.capture(step, (torch.randn(5, 6), torch.randint(0, 3, (5,))))


def test_muon_in_bfloat16_is_explained() -> None:
    with pytest.raises(RuntimeUnavailableError) as caught:
        sx.load(captured(torch.optim.Muon), target="onnx", threads=1)
    text = str(caught.value)
    assert "torch's Muon, whatever the dtype of the model, computes in bfloat16" in text
    assert "from the node 'update/Cast" in text
    assert "'torch-compile', 'torchscript', 'aot-inductor'" in text
    assert "Export the model in float32" not in text


def test_muon_runs_on_a_target_that_the_error_names() -> None:
    session = sx.load(captured(torch.optim.Muon), target="torchscript", threads=1)
    assert bool(session.step(torch.randn(5, 6), torch.randint(0, 3, (5,))).finite)


def test_a_model_in_bfloat16_is_explained() -> None:
    with pytest.raises(RuntimeUnavailableError, match="The model or its optimizer computes in bf"):
        sx.load(captured(torch.optim.SGD, half=True), target="onnx", threads=1)
