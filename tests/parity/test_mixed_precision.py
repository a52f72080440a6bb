"""The parity check of steps with autocast and loss scaling: right ones pass, wrong ones do not."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export.api import load
from sam_export.errors import ParityError
from sam_export.parity.mutants import MUTANTS, NUMBERS, ModelName
from sam_export.parity.mutated_step import captured_mutants
from sam_export.parity.self_test import CONTROL, MutantSession
from sam_export.parity.self_test_models import batches_of, step_of
from sam_export.runtime.detect import target_status
from sam_export.step.loss_scaling import Scaler
from tests.runtime import mixed_cases
from tests.runtime.mixed_cases import SCALING, batch

ONNX = ("onnx", "onnx-training", "ort-artifacts")
EVERY = ("torchscript", "torch-compile", "aot-inductor", *ONNX)


class Net(nn.Module):
    """Convolutions, BatchNorm, pooling, attention, LayerNorm, dropout, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 8, 3, stride=2, bias=False)
        self.position = nn.Embedding(9, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        x = nn.functional.silu(self.down(x)).flatten(2).transpose(1, 2)
        x = x + self.position(torch.arange(9, device=x.device))
        return self.last(self.block(x).mean(1))


def images(size: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = scale * torch.randn(size, 1, 14, 14, generator=generator)
    return x, torch.randint(5, (size,), generator=generator)


def net_step(dtype: torch.dtype) -> sx.TrainStep:
    torch.manual_seed(0)
    model = Net()
    sam = sx.SAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=1e-2)
    scaling = SCALING if dtype == torch.float16 else None
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    return sx.TrainStep(model, loss, sam, autocast=dtype, loss_scaling=scaling, seed=3)


BATCHES = [images(16), images(16, 1e5), images(7), images(12)]
"""The second one overflows in float16, not in bfloat16 or float32."""


def passes(report: sx.ParityReport) -> None:
    assert report.ok, str(report)


@pytest.mark.parametrize("target", [t for t in EVERY if t != "aot-inductor"])
def test_float16_is_eagers_through_an_overflow(target: str) -> None:
    if target_status(target).run:
        pytest.skip(f"{target} cannot run here")
    report = sx.check_parity(net_step(torch.float16), BATCHES, targets=[target], num_steps=6)
    passes(report)
    assert any("autocast to float16" in note for note in report.notes)
    rows = {row.name: row for row in report.targets[0].rows if row.mode == "lock-step"}
    assert rows["scaler.scale"].bound == rows["scaler.growth_tracker"].bound == 0.0
    assert rows["loss_scale"].role == "metric"
    # The bounds mean something: a fault of 8 % in the change of the last layer would be seen.
    assert rows["last.weight"].bound < 0.08 * rows["last.weight"].change


def test_bfloat16_is_eagers() -> None:
    passes(sx.check_parity(net_step(torch.bfloat16), BATCHES, targets=["torchscript"], num_steps=4))


@pytest.mark.parametrize(
    ("target", "dtype"), [("aot-inductor", torch.float16), ("torch-compile", torch.bfloat16)]
)
def test_a_small_step_is_eagers(target: str, dtype: torch.dtype) -> None:
    step = mixed_cases.step_of(autocast=dtype, scaling=SCALING)
    batches = [batch(1), batch(2), (batch(3)[0] * 1e5, batch(3)[1]), batch(4)]
    passes(sx.check_parity(step, batches, targets=[target], num_steps=6))


TOGETHER: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "parts": ({}, {"micro_batches": 2}, {}),
    "parts with a perturbation each": (
        {},
        {"micro_batches": 2, "perturbation_per": "micro_batch", "clip_norm": 0.1},
        {},
    ),
    "an average": ({}, {"running_stats": "both"}, {"ema": sx.EMA(0.8)}),
    "GSAM": ({"variant": sx.GSAM()}, {}, {}),
    "Friendly SAM": ({"variant": sx.FriendlySAM()}, {}, {}),
    "LookSAM": ({"variant": sx.LookSAM(), "every": 2}, {}, {}),
    "ASAM, two ascent steps": ({"perturbation": sx.ASAM(), "ascent_steps": 2}, {}, {}),
}
"""Options that the scale of the loss has to live with: SAM's, semantics, the step's."""


@pytest.mark.parametrize(
    ("name", "target"),
    [(name, ("onnx", "torchscript")[index % 2]) for index, name in enumerate(TOGETHER)],
)
def test_a_scaled_loss_with_other_options(name: str, target: str) -> None:
    """Through an overflow, in a batch of each kind of step."""
    sam_options, semantics, others = TOGETHER[name]
    torch.manual_seed(0)
    model = mixed_cases.Small()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9, **sam_options)
    step = sx.TrainStep(
        model, nn.CrossEntropyLoss(), sam, semantics=sx.Semantics(**semantics),
        autocast=torch.float16, loss_scaling=SCALING, **others,
    )  # fmt: skip
    batches = [batch(1), batch(2), batch(3, 6), batch(4)]
    batches[1] = (batches[1][0] * 1e6, batches[1][1])
    session = load(sx.capture(step, batch()), target=target)
    report = sx.check_parity(step, batches, sessions={target: session}, num_steps=6)
    passes(report)
    scale = float(session.state["scaler.scale"])
    for one in batches[:2]:
        session.step(*one)
    assert float(session.state["scaler.scale"]) == scale / 2


# -- what slips, and nothing else --------------------------------------------------------------

NARROWER = {"large epsilon", "gradient in half precision", "betas in float32"}
"""Faults below what float16 itself rounds: 1e-3 beside a scaled norm, one rounding more, 1e-5."""

SLIPS = {
    torch.float16: NARROWER,
    # decay of 0.05 x lr of a weight; 1e-6 beside a root; n / (n - 1) at n > 400
    torch.bfloat16: NARROWER | {"decay dropped", "Adam's epsilon", "biased variance"},
}
"""bfloat16 has three digits: effects of less than a percent are inside its own error."""


def mixed(kind: ModelName, dtype: torch.dtype) -> sx.TrainStep:
    step = step_of(kind)
    scaling = SCALING if dtype == torch.float16 else None
    return sx.TrainStep(
        step.model, step.loss_fn, step.optimizer, seed=1, autocast=dtype, loss_scaling=scaling
    )


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("conv", torch.float16), ("mlp", torch.float16), ("mlp", torch.bfloat16)],
)
def test_the_faults_of_the_self_test_are_caught(kind: ModelName, dtype: torch.dtype) -> None:
    batches = batches_of(kind)
    captured = captured_mutants(kind, mixed(kind, dtype), batches[0])
    shared = load(captured, target="torchscript")
    names = [CONTROL, *(mutant.name for mutant in MUTANTS if kind in mutant.models)]
    sessions = {name: MutantSession(shared, NUMBERS.get(name, 0)) for name in names}
    report = sx.check_parity(mixed(kind, dtype), batches, sessions=sessions, num_steps=6)
    assert [target.name for target in report.targets if target.error is not None] == []
    slipped = {target.name for target in report.targets if target.ok} - {CONTROL}
    assert report.targets[0].ok, str(report)
    assert slipped <= SLIPS[dtype]


@dataclass(frozen=True)
class WrongScaler(Scaler):
    """A scaler with one fault."""

    fault: str
    calls: list[int]

    def inverse(self) -> Tensor:
        self.calls.append(1)
        place = {"first gradient not unscaled": 1, "second gradient not unscaled": 2}
        right = super().inverse()
        return torch.ones_like(right) if place.get(self.fault) == len(self.calls) else right

    def after(self, finite: Tensor) -> tuple[Tensor, Tensor]:
        scale, tracker = super().after(finite)
        if self.fault == "scale is not lowered":
            scale = torch.where(finite, scale, self.scale)
        if self.fault == "scale is quartered":
            scale = torch.where(finite, scale, scale * 0.5)
        if self.fault == "tracker goes on after an overflow":
            tracker = torch.where(finite, tracker, self.growth_tracker)
        if self.fault == "scale never grows":
            scale = torch.minimum(scale, self.scale)
        if self.fault == "state is not kept":
            scale, tracker = self.scale * 1.0, self.growth_tracker * 1
        return scale, tracker


SCALER_FAULTS = (
    "first gradient not unscaled",
    "second gradient not unscaled",
    "scale is not lowered",
    "scale is quartered",
    "tracker goes on after an overflow",
    "scale never grows",
    "state is not kept",
)


def session_with(fault: str, monkeypatch: pytest.MonkeyPatch) -> sx.Session:
    wrong = functools.partial(WrongScaler, fault=fault, calls=[])
    with monkeypatch.context() as patch:
        patch.setattr("sam_export.tracing.new_state.Scaler", wrong)
        captured = sx.capture(mixed_cases.step_of(), batch())
    return load(captured, target="torchscript")


def test_faults_of_a_scaler_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [batch(1), (batch(2)[0] * 1e5, batch(2)[1]), batch(3), batch(4, 5)]
    sessions = {fault: session_with(fault, monkeypatch) for fault in ("", *SCALER_FAULTS)}
    report = sx.check_parity(mixed_cases.step_of(), batches, sessions=sessions, num_steps=10)
    assert [target.name for target in report.targets if target.error is not None] == []
    assert [target.name for target in report.targets if target.ok] == [""]


def test_a_target_that_rounds_less_passes() -> None:
    """float64 without casts is the judge: what is nearer to it is no fault."""
    without = mixed_cases.step_of(autocast=None)
    session = load(sx.capture(without, batch()), target="torchscript")
    report = sx.check_parity(
        mixed_cases.step_of(), [batch(1), batch(2, 5)], sessions={"wide": session}, num_steps=4
    )
    passes(report)


def test_a_scale_that_only_some_orders_of_the_batch_overflow_with_is_an_error() -> None:
    """The largest gradient is next to 65504: whether it overflows is rounding."""

    class Edge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((1, 1), 1e-3))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight)

    model = Edge()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.0, lr=1e-3)
    step = sx.TrainStep(
        model,
        lambda out: out.float().sum(),
        sam,
        num_targets=0,
        autocast=torch.float16,
        loss_scaling=sx.LossScaling(1.0),
    )
    x = np.full((5, 1), 65504 / 5, np.float32)
    with pytest.raises(ParityError, match="at the edge of overflow"):
        sx.check_parity(step, [(torch.tensor(x),)], targets=["torchscript"], num_steps=1)
