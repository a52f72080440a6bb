"""Laws of a right step: wrong ones break them, and where they do not hold they do not apply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export.parity.laws import Law
from tests.parity.cases import HYPER, RHO, batches_for, step_of
from tests.parity.loops import PlainLoop


class WithHyper(PlainLoop):
    """`PlainLoop` that takes ``rho`` for one step, as a session does."""

    def step(self, x: Any, y: Any, rho: Any = RHO) -> Any:
        self.rho = float(rho[0] if isinstance(rho, list) else rho)
        return super().step(x, y)


def laws_of(step: sx.TrainStep, kind: str, **options: Any) -> dict[str, Law]:
    loop = WithHyper(step.model, RHO, **HYPER, **options)
    report = sx.check_parity(
        step, batches_for(kind, "float64"), sessions={"loop": loop}, num_steps=1
    )
    return {law.name: law for law in report.targets[0].laws}


NAMES = {
    "radius": "The perturbation has the norm rho",
    "base": "With rho = 0 the step is the base optimizer's",
    "doubled": "Repeating the batch does not change a mean loss",
    "order": "The order of the examples does not matter",
    "nan": "A batch with a NaN or an infinity is seen, and changes no weight",
}


def test_a_right_loop_obeys_all_of_them() -> None:
    laws = laws_of(step_of("conv", "float64"), "conv")
    assert {name: law.verdict for name, law in laws.items()} == dict.fromkeys(NAMES.values(), "ok")


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        ("rho doubled", "radius"),
        ("squared norm", "radius"),
        ("gradient times batch size", "base"),
        ("decay dropped", "base"),
        ("nan", "base"),
    ],
)
def test_a_wrong_loop_breaks_one(fault: str, broken: str) -> None:
    laws = laws_of(step_of("mlp", "float64"), "mlp", fault=fault)
    assert laws[NAMES[broken]].verdict == "FAIL", laws


def test_a_sum_over_the_batch_is_no_mean() -> None:
    step = step_of("mlp", "float64")
    step = sx.TrainStep(
        step.model, nn.CrossEntropyLoss(reduction="sum"), step.optimizer, semantics=step.semantics
    )
    report = sx.check_parity(
        step, batches_for("mlp", "float64"), targets=["torchscript"], num_steps=1, isolate=False
    )
    laws = {law.name: law for law in report.targets[0].laws}
    assert laws[NAMES["doubled"]].verdict == "not applicable"
    assert "loss of eager itself is another" in laws[NAMES["doubled"]].detail
    assert laws[NAMES["order"]].verdict == "ok"


class WrongBackward(torch.autograd.Function):
    """The square, with 1.01 times its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2.02 * x * dy


class Square(nn.Module):
    def __init__(self, right: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 5)
        self.right = right

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * y if self.right else WrongBackward.apply(y)  # type: ignore[no-any-return,no-untyped-call]


@pytest.mark.parametrize("right", [True, False])
def test_a_models_own_wrong_backward_is_found(right: bool) -> None:
    """Every target would equal it; only the loss itself says that it is wrong."""
    torch.manual_seed(0)
    model = Square(right).double()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=RHO, **HYPER)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam)
    loop = PlainLoop(model, RHO, **HYPER)
    report = sx.check_parity(
        step, batches_for("mlp", "float64"), sessions={"loop": loop}, num_steps=1
    )
    verdicts = [law.verdict for law in report.laws]
    assert verdicts == (["ok", "ok"] if right else ["FAIL", "FAIL"])
    assert report.ok == (right and report.targets[0].ok)
    if not right:
        assert "finite differences agree with the gradient at w" in str(report)
