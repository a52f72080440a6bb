"""Captured graphs with autocast, where weights are used twice, recomputed, or looped over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sam_export as sx
from sam_export._compat.inductor import on_device


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(7, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(torch.tanh(self.layer(self.embedding(x))))
        return F.linear(h.mean(1), self.embedding.weight)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.3))
        self.last = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.first, x, use_reentrant=False))


def ctc(outputs: Tensor, labels: Tensor) -> Tensor:
    logs = outputs.view(len(outputs), 4, 3).log_softmax(-1).transpose(0, 1)
    lengths = [torch.full((len(outputs),), n) for n in (4, 2)]
    return F.ctc_loss(logs, labels, *lengths)


def case(name: str) -> tuple[nn.Module, Any, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, labels = torch.randn(6, 5), torch.randint(7, (6,))
    if name == "a weight used twice, and tied":
        return Tied(), F.cross_entropy, (torch.randint(7, (6, 4)), labels)
    if name == "checkpointed, with dropout":
        return Checkpointed(), F.cross_entropy, (x, labels)
    if name == "ctc":
        return nn.Linear(5, 12), ctc, (x, 1 + torch.randint(2, (6, 2)))
    assert name == "multilabel margin"
    return nn.Linear(5, 3), F.multilabel_margin_loss, (x, torch.tensor([[0, 1, -1]] * 6))


@pytest.mark.parametrize(
    "name",
    ["a weight used twice, and tied", "checkpointed, with dropout", "ctc", "multilabel margin"],
)
def test_a_graph_casts_where_eager_does(name: str) -> None:
    """Its operators, run by ATen, give eager's losses to the bit and its weights to rounding."""
    model, loss, batch = case(name)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    scaling = sx.LossScaling(1024.0)
    step = sx.TrainStep(model, loss, sam, seed=1, autocast=torch.float16, loss_scaling=scaling)
    captured = sx.capture(step, batch, dynamic=None)
    spec = captured.contract.program("step")
    given: dict[str, Tensor] = {k: torch.from_numpy(v) for k, v in captured.state.items()}
    given["hyper.lr"] = torch.tensor([0.1], dtype=torch.float64)
    given["hyper.rho"] = torch.tensor([0.05], dtype=torch.float64)
    given |= zip([item.name for item in captured.contract.batch], batch, strict=True)
    run = on_device(captured.programs["step"], torch.device("cpu"))
    values = run(*(given[key] for key in spec.inputs))
    found = {o.name: value for o, value in zip(spec.outputs, values, strict=True)}
    expected = step(*batch)
    assert float(found["loss"]) == float(expected.loss)
    for key, p in model.named_parameters():
        change = float((p.detach() - before[key]).norm())
        assert float((found[f"next.{key}"] - p.detach()).norm()) <= 1e-3 * change, key


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x)[0][:, -1])


def test_a_loop_over_tokens_is_refused() -> None:
    model = Recurrent()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam, autocast=torch.bfloat16)
    x, y = torch.randn(6, 4, 5), torch.randint(3, (6,))
    with pytest.raises(sx.CaptureError, match="symbolic number of tokens.*autocast"):
        sx.capture(step, (x, y), dynamic={"x": {1: "time"}})
