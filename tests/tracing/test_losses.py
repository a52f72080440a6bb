"""Losses that are computed in a way of our own while a step is traced, against eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sam_export as sx
from tests.lower.onnx_cases import randn

LABELS = torch.tensor([[1, 3, -1, 0, 2], [0, -1, 1, 2, 3], [4, 2, 1, -1, 0], [-1, 0, 0, 0, 0]])
PADDED = torch.tensor([[1, 2, 2, 0], [3, 3, 1, 4], [2, 0, 0, 0]])
IN_A_ROW = torch.tensor([1, 2, 2, 3, 3, 1, 4, 2])
LENGTHS, TIMES = [3, 4, 1], [9, 9, 5]
TOO_LONG = [2, 9, 5]
"""The first example has fewer time steps than labels: no path, an infinite loss."""


class Loss(nn.Module):
    """A loss of the model's own parameters, in float64."""

    def __init__(self, loss: Callable[..., Tensor], *values: Tensor) -> None:
        super().__init__()
        self.loss = loss
        self.values = nn.ParameterList(value.double() for value in values)

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(*self.values).sum() * x.mean()


def ctc(targets: Tensor, times: list[int], as_tensor: bool = False, **options: object) -> Callable:  # type: ignore[type-arg]
    lengths = torch.tensor(LENGTHS) if as_tensor else LENGTHS
    steps = torch.tensor(times) if as_tensor else times
    return lambda x: F.ctc_loss(x.log_softmax(2), targets, steps, lengths, **options)  # type: ignore[arg-type]


CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    **{
        f"multilabel margin, {reduction}": (
            lambda x, r=reduction: F.multilabel_margin_loss(x, LABELS, reduction=r),
            (randn(4, 5),),
        )
        for reduction in ("none", "mean", "sum")
    },
    "multilabel margin of one": (lambda x: F.multilabel_margin_loss(x, LABELS[0]), (randn(5),)),
    "multilabel margin, module": (lambda x: nn.MultiLabelMarginLoss()(x, LABELS), (randn(4, 5),)),
    "gaussian nll": (
        lambda x, v: F.gaussian_nll_loss(x, torch.ones_like(x), v.exp()),
        (randn(4, 3), randn(4, 3, seed=1)),
    ),
    "gaussian nll, full, one variance a row, tiny": (
        lambda x, v: F.gaussian_nll_loss(x, 0 * x, (8 * v).exp(), full=True, eps=0.1),
        (randn(4, 3), randn(4, seed=1)),
    ),
    "gaussian nll, a number": (
        lambda x: F.gaussian_nll_loss(x, x.detach() + 1, 0.3, reduction="sum"),
        (randn(4, 3),),
    ),
    "ctc": (ctc(PADDED, TIMES), (randn(9, 3, 5),)),
    "ctc, in a row": (ctc(IN_A_ROW, TIMES, reduction="sum"), (randn(9, 3, 5),)),
    "ctc, lengths as tensors": (ctc(PADDED, TIMES, True), (randn(9, 3, 5),)),
    "ctc, no path": (ctc(PADDED, TOO_LONG, zero_infinity=True), (randn(9, 3, 5),)),
    "ctc, not normalized": (
        lambda x: F.ctc_loss(x, PADDED, TIMES, LENGTHS, reduction="none"),
        (randn(9, 3, 5) - 2,),
    ),
    "ctc of one": (
        lambda x: F.ctc_loss(x.log_softmax(1), PADDED[0, :3], torch.tensor(9), torch.tensor(3)),
        (randn(9, 5),),
    ),
}


def step_of(name: str) -> sx.TrainStep:
    loss, values = CASES[name]
    model = Loss(loss, *values)
    sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.05)
    return sx.TrainStep(model, lambda output, _: output, sam)


BATCH = torch.ones(2, dtype=torch.float64), torch.zeros(2)


@pytest.mark.parametrize("name", CASES)
def test_the_captured_step_is_eagers(name: str) -> None:
    captured = sx.capture(step_of(name), BATCH, dynamic=None)
    session = sx.load(captured, target="torchscript")
    found = session.step(*BATCH)
    eager = step_of(name)
    result = eager(*BATCH)
    assert bool(result.finite)
    assert float(found.loss) == pytest.approx(float(result.loss), rel=1e-12)
    before = dict(step_of(name).model.named_parameters())
    for key, value in eager.model.named_parameters():
        change = value.detach() - before[key].detach()
        error = torch.from_numpy(session.state[key]) - value.detach()
        assert float(error.norm()) <= 1e-10 * float(change.norm()), key


def test_a_negative_variance_makes_a_step_that_is_not_finite() -> None:
    model = Loss(lambda x, v: F.gaussian_nll_loss(x, 0 * x, v), randn(4, 3), -torch.ones(4, 3))
    sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.05)
    step = sx.TrainStep(model, lambda output, _: output, sam)
    with pytest.raises(ValueError, match="negative"):
        step(*BATCH)
    session = sx.load(sx.capture(step, BATCH, dynamic=None), target="torchscript")
    assert not bool(session.step(*BATCH).finite)
