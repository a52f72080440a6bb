"""Random draws in a captured step, against the eager step with the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from tests.step.test_sam import batches
from tests.tracing.test_capture import Runner, make


class Noisy(nn.Module):
    """One layer of noise between two linear ones; the noise is multiplied or added by values."""

    def __init__(self, noise: nn.Module) -> None:
        super().__init__()
        self.first, self.noise, self.last = nn.Linear(5, 16), noise, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.noise(torch.tanh(self.first(x))))


class StochasticDepth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        keep = (torch.rand(x.shape[0], 1, dtype=x.dtype) < 0.7).to(x.dtype)
        return x * keep / 0.7


class Gaussian(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class OfValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.sigmoid(x))


NOISES = {
    "dropout": nn.Dropout(0.4),
    "alpha dropout": nn.AlphaDropout(0.3),
    "stochastic depth": StochasticDepth(),
    "gaussian": Gaussian(),
}


@pytest.mark.parametrize("randomness", ["same", "fresh"])
@pytest.mark.parametrize("noise", NOISES)
def test_the_graph_draws_and_uses_what_eager_does(noise: str, randomness: Any) -> None:
    """Both losses, so that the second pass has the first one's draw but its own activations."""
    torch.manual_seed(0)
    model = Noisy(NOISES[noise]).double()
    step = make(model, "sgd", sx.Semantics(randomness=randomness))
    step.optimizer.param_groups[0]["rho"] = 0.5
    runner = Runner(sx.capture(step, batches(1, torch.float64)[0]))
    for batch in batches(3, torch.float64):
        torch.manual_seed(11)
        named = runner.step(batch, rho=[0.5])
        torch.manual_seed(11)
        result = step(*batch)
        for key in ("loss", "perturbed_loss", "grad_norm"):
            assert float(named[key]) == pytest.approx(float(getattr(result, key)), rel=1e-12), key
        for name, p in model.named_parameters():
            torch.testing.assert_close(runner.state[name], p.detach(), rtol=1e-12, atol=1e-14)


def test_a_draw_that_depends_on_values_is_refused_or_fresh() -> None:
    torch.manual_seed(0)
    model = Noisy(OfValues()).double()
    with pytest.raises(sx.CaptureError, match=r"aten\.bernoulli.*randomness=\"fresh\""):
        sx.capture(make(model, "sgd"), batches(1, torch.float64)[0])
    fresh = make(model, "sgd", sx.Semantics(randomness="fresh"))
    assert len(sx.capture(fresh, batches(1, torch.float64)[0]).random_ops) == 2
