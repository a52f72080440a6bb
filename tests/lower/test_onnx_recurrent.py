"""The loop of an LSTM in ONNX, against the operators themselves and against `torch.nn.LSTM`."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from models.lstm import LSTMClassifier
from models.optimizers import cross_entropy_step
from sam_export.tracing.recurrent import LoopedRecurrence, lstm_steps
from tests.lower.onnx_cases import check, every_dtype, randn

TOKENS, BATCH, HIDDEN = 5, 3, 4


# What is tested here, as `test_every_form_has_a_test_here` looks for it:
# aten.sam_export::lstm_steps, aten.sam_export::lstm_steps_backward,


@every_dtype
def test_lstm_steps(dtype: torch.dtype) -> None:
    shapes = [(TOKENS, BATCH, 4 * HIDDEN), (BATCH, HIDDEN), (BATCH, HIDDEN), (4 * HIDDEN, HIDDEN)]
    x, h, c, w = (randn(*s, seed=i).to(dtype) for i, s in enumerate(shapes))
    _, cells, gates = lstm_steps(x, h, c, w)
    before = torch.cat((c[None], cells))[:-1]
    ds, dc = (randn(TOKENS, BATCH, HIDDEN, seed=9 + i).to(dtype) for i in range(2))
    check(
        forward=(torch.ops.sam_export.lstm_steps, [x, h, c, w]),
        backward=(torch.ops.sam_export.lstm_steps_backward, [ds, dc, gates, cells, before, w]),
    )


@functools.cache
def captured(time: bool = True) -> sx.CapturedStep:
    step = cross_entropy_step(LSTMClassifier(7, 3, 4), "sgd", 0.05, None)
    batch = torch.randint(7, (3, 6)), torch.randint(7, (3,))
    marks = {0: "batch", 1: "time"} if time else {0: "batch"}
    return sx.capture(step, batch, dynamic={"x": marks, "target": {0: "batch"}})


def operators(step: sx.CapturedStep) -> list[str]:
    return [str(node.target) for node in step.programs["step"].graph.nodes]


def test_the_loop_is_one_operator_only_where_the_number_of_tokens_is_symbolic() -> None:
    looped = operators(captured())
    assert looped.count("sam_export.lstm_steps.default") == 2  # one per pass
    assert looped.count("sam_export.lstm_steps_backward.default") == 2
    copied = operators(captured(time=False))
    assert not [name for name in copied if name.startswith("sam_export.")]
    assert copied.count("aten.tanh.default") > 12


@pytest.mark.parametrize("target", ["torchscript", "torch-compile", "aot-inductor"])
def test_targets_without_a_loop_refuse_it(target: str, tmp_path: object) -> None:
    with pytest.raises(sx.LoweringError, match=r"LSTM in .*lstm.*only onnx.*dynamic='batch'"):
        sx.export(captured(), f"{tmp_path}/step", target=target)


class Everything(nn.Module):
    """Uses all three results, and no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, bias=False, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        y, (h, c) = self.lstm(x)
        return y.square().sum() + (h * c).sum() + c.pow(3).sum()


def test_the_loop_and_its_gradient_are_torchs_own() -> None:
    torch.manual_seed(0)
    model = Everything().double()
    x = torch.randn(5, 3, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x), leaves)

    class Symbolic(LoopedRecurrence):
        """Takes every number of tokens for a symbolic one."""

        def loops(self, tokens: object) -> bool:
            return True

    with Symbolic():
        found = torch.autograd.grad(model(x), leaves)
    for own, torchs in zip(found, expected, strict=True):
        assert torch.allclose(own, torchs, rtol=1e-12, atol=1e-13)
