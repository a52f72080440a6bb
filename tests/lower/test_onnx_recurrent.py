"""The loop of an LSTM in ONNX, against the operators themselves and against `torch.nn.LSTM`."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from models.lstm import LSTMClassifier
from models.optimizers import cross_entropy_step
from sam_export.tracing.gru_steps import gru_steps
from sam_export.tracing.lstm_steps import lstm_steps
from sam_export.tracing.recurrent import LoopedRecurrence
from tests.lower.onnx_cases import check, every_dtype, randn

TOKENS, BATCH, HIDDEN = 5, 3, 4


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


@every_dtype
def test_gru_steps(dtype: torch.dtype) -> None:
    shapes = [(TOKENS, BATCH, 3 * HIDDEN), (BATCH, HIDDEN), (3 * HIDDEN, HIDDEN), (3 * HIDDEN,)]
    x, h, w, b = (randn(*s, seed=i).to(dtype) for i, s in enumerate(shapes))
    states, gates = gru_steps(x, h, w, b)
    before = torch.cat((h[None], states))[:-1]
    ds = randn(TOKENS, BATCH, HIDDEN, seed=9).to(dtype)
    check(
        forward=(torch.ops.sam_export.gru_steps, [x, h, w, b]),
        backward=(torch.ops.sam_export.gru_steps_backward, [ds, gates, before, w]),
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
    with pytest.raises(
        sx.LoweringError, match=r"recurrence in .*recurrence.*only onnx.*dynamic='batch'"
    ):
        sx.export(captured(), f"{tmp_path}/step", target=target)


class Everything(nn.Module):
    """Uses all results of a recurrence."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], bias: bool) -> None:
        super().__init__()
        self.recurrence = kind(3, 4, num_layers=2, bias=bias, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        y, last = self.recurrence(x)
        h, c = last if isinstance(last, tuple) else (last, last)
        return y.square().sum() + (h * c).sum() + c.pow(3).sum()


class Looped(LoopedRecurrence):
    """Takes every number of tokens for a symbolic one."""

    def loops(self, tokens: object) -> bool:
        return True


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_loop_and_its_gradient_are_torchs_own(
    kind: type[nn.LSTM] | type[nn.GRU], bias: bool
) -> None:
    torch.manual_seed(0)
    model = Everything(kind, bias).double()
    x = torch.randn(5, 3, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x), leaves)
    with Looped():
        loss = model(x)
    assert "_steps_" in graph_of(loss)
    for own, torchs in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert torch.allclose(own, torchs, rtol=1e-12, atol=1e-13)


def graph_of(value: Tensor) -> str:
    """Names of the nodes of an autograd graph."""
    names, pending = set(), [value.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in names:
            names.add(node)
            pending += [before for before, _ in node.next_functions]
    return " ".join(node.name() for node in names)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_between_layers_is_drawn(kind: type[nn.RNNBase]) -> None:
    # torch's own decomposition of a recurrence forgets it.
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrence = kind(3, 4, num_layers=3, dropout=0.4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.recurrence(x)[0].mean(1)

    model = Model().double()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.05)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam)
    batches = [(torch.randn(4, 3, 3, dtype=torch.float64), torch.randint(4, (4,)))]
    captured = sx.capture(step, batches[0])
    words = [n for n in captured.programs["step"].graph.nodes if "random_mask" in str(n.target)]
    assert len(words) == 2  # between three layers, shared by both passes
    report = sx.check_parity(step, batches, targets=["onnx"], num_steps=1)
    assert report.ok, str(report)


def test_dropout_in_a_packed_sequence_is_refused() -> None:
    lstm = nn.LSTM(3, 4, num_layers=2, dropout=0.4)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 3]))
    with LoopedRecurrence(), pytest.raises(sx.CaptureError, match=r"packed.*dropout=0.4.*forgets"):
        lstm(packed)
    with LoopedRecurrence():
        assert lstm.eval()(packed)[0].data.shape == (8, 4)


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 6, proj_size=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lstm(x)[0][:, -1]
        return y


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_projection_is_not_taken_for_a_loop() -> None:
    """Over a symbolic number of tokens it is refused, and right where the number is fixed."""
    step = cross_entropy_step(Projected(), "sgd", 0.05, None)
    batch = torch.randn(4, 5, 3), torch.randint(2, (4,))
    with pytest.raises(sx.CaptureError, match="time"):
        sx.capture(step, batch, dynamic={"x": {0: "batch", 1: "time"}, "target": {0: "batch"}})
    session = sx.load(sx.capture(step, batch), target="torchscript")
    loss = float(session.step(*batch).loss)
    assert loss == pytest.approx(float(step(*batch).loss), rel=1e-6)
