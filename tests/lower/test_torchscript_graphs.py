"""Scripted modules of models whose graphs hold unusual things."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from tests.lower.test_torchscript import captured_step, module_of
from tests.step.test_sam import batches


class Constant(nn.Module):
    """A tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.scale = torch.tensor([1.0, 2.0, 0.5])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale + torch.tensor(0.25)


class Sizes(nn.Module):
    """Arithmetic on the symbolic batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        both = torch.cat([y, y * 2]).reshape(2, -1, 3).sum(0)
        ramp = torch.arange(x.shape[0] * 2, dtype=x.dtype, device=x.device).reshape(-1, 2)
        return both / (x.shape[0] + 1) + ramp.mean(1, keepdim=True)


class Indexed(nn.Module):
    """Indexing with None, empty lists, infinities, a comparison and a selection."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("order", torch.tensor([2, 0, 1]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)[:, self.order]
        masked = y.masked_fill(y < -2.0, -math.inf).clamp(min=-4.0)
        top = y.max(dim=1, keepdim=True).values
        return masked + torch.where(y > 0, top, y.new_zeros([])) + y.sum()


class Nested(nn.Module):
    """Names that are no identifiers, a scalar parameter, a tied weight, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"1st": nn.Linear(5, 4), "my-norm": nn.LayerNorm(4)})
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.out = nn.Linear(4, 4)
        self.again = self.out

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.parts["my-norm"](self.parts["1st"](x))) * self.gain
        return self.again(torch.tanh(self.out(h)))


@pytest.mark.parametrize("kind", [Constant, Sizes, Indexed, Nested])
def test_unusual_graphs_equal_eager(kind: type[nn.Module]) -> None:
    torch.manual_seed(1)
    model = kind().double()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.05, momentum=0.9)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam)
    data = batches(2, torch.float64)
    module = module_of(sx.capture(step, data[0]))
    for x, y in [*data, (data[0][0][:4], data[0][1][:4])]:
        expected = step(x, y)
        found = module.step(x, y)
        assert float(found["loss"]) == pytest.approx(float(expected.loss), rel=1e-13)
        assert float(found["grad_norm"]) == pytest.approx(float(expected.grad_norm), rel=1e-12)
    held = dict(module.named_parameters())
    for name, value in model.named_parameters():
        torch.testing.assert_close(held[name], value.detach(), rtol=1e-12, atol=1e-14)
    model.eval()
    torch.testing.assert_close(module.evaluate(x), model(x).detach(), rtol=1e-12, atol=1e-14)


def test_several_outputs_come_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.linear(x)
            return {"logits": y, "parts": (y * 2, y + 1)}

    model = Two()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    step = sx.TrainStep(model, lambda o, t: nn.functional.cross_entropy(o["logits"], t), sam)
    x, y = batches(1)[0]
    module = module_of(sx.capture(step, (x, y), return_outputs=True))
    found = module.evaluate(x)
    assert set(found) == {"logits", "parts.0", "parts.1"}
    torch.testing.assert_close(found["parts.1"], model(x)["parts"][1].detach())
    assert "output.logits" in module.step(x, y)


def test_on_cuda_too() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    captured = captured_step()
    module, here = module_of(captured).to("cuda"), module_of(captured)
    for x, y in batches(3):
        assert float(module(x.cuda(), y.cuda())) == pytest.approx(float(here(x, y)), rel=1e-5)


def test_an_argument_may_have_any_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, ValueError: Tensor) -> Tensor:
            return self.linear(ValueError)

    torch.manual_seed(0)
    module = module_of(captured_step(Named()))
    x, y = batches(1)[0]
    with pytest.raises(torch.jit.Error, match="batch tensor 'ValueError' is float64"):
        module(x.double(), y)


def test_a_batch_of_any_layout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 3))
    module = module_of(captured_step(model))
    x, y = batches(1)[0]
    turned = x.t().contiguous().t()
    assert not turned.is_contiguous()
    torch.testing.assert_close(module.evaluate(turned), module.evaluate(x))
    assert float(module(turned, y)) == pytest.approx(float(module.evaluate_loss(x, y)), abs=1)


def test_a_draw_keeps_its_place_whatever_it_is_for() -> None:
    """A draw that feeds only a buffer comes before the dropout that follows it."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3)
            self.drop = nn.Dropout(0.5)
            self.register_buffer("noise", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.noise.copy_(torch.rand(3))
            return self.drop(self.linear(x))

    torch.manual_seed(0)
    model = Noisy()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.05)
    fresh = sx.Semantics(randomness="fresh")
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam, semantics=fresh)
    x, y = batches(1)[0]
    module = module_of(sx.capture(step, (x, y)))
    torch.manual_seed(3)
    found = float(module(x, y))
    torch.manual_seed(3)
    assert found == pytest.approx(float(step(x, y).loss), rel=1e-6)
