"""Random draws in a captured step, against the eager step: of its own generator, and of torch's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sam_export as sx
from sam_export.tracing.randomness import drawn_nodes
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


class Unused(nn.Module):
    """A draw that nobody uses comes first."""

    def forward(self, x: Tensor) -> Tensor:
        torch.rand_like(x)
        return nn.functional.dropout(x, 0.4)


class Recomputed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        inner = lambda x: torch.tanh(nn.functional.dropout(x, 0.4) * 2)  # noqa: E731
        result: Tensor = checkpoint(inner, x, use_reentrant=False)
        return result


NOISES = {
    "dropout": nn.Dropout(0.4),
    "alpha dropout": nn.AlphaDropout(0.3),
    "stochastic depth": StochasticDepth(),
    "gaussian": Gaussian(),
    "bernoulli of values": OfValues(),
    "an unused draw": Unused(),
    "a checkpointed layer": Recomputed(),
    "rrelu": nn.RReLU(),
}

# Torch's own draws of these cannot be paired, or not in the graph.
OWN_ONLY = ("bernoulli of values", "an unused draw", "a checkpointed layer", "rrelu")

CASES = [
    (generator, noise)
    for generator in ("philox", "torch")
    for noise in NOISES
    if generator == "philox" or noise not in OWN_ONLY
]


@pytest.mark.parametrize("randomness", ["same", "fresh"])
@pytest.mark.parametrize(("generator", "noise"), CASES)
def test_the_graph_draws_and_uses_what_eager_does(
    generator: Any, noise: str, randomness: Any
) -> None:
    """Both losses, so that the second pass has the first one's draw but its own activations."""
    torch.manual_seed(0)
    model = Noisy(NOISES[noise]).double()
    semantics = sx.Semantics(randomness=randomness, generator=generator)
    step = make(model, "sgd", semantics)
    step.optimizer.param_groups[0]["rho"] = 0.5
    captured = sx.capture(step, batches(1, torch.float64)[0])
    assert bool(captured.random_ops) == (generator == "torch")
    runner = Runner(captured)
    for batch in batches(3, torch.float64):
        torch.manual_seed(11)
        named = runner.step(batch, rho=[0.5])
        torch.manual_seed(11)
        result = step(*batch)
        for key in ("loss", "perturbed_loss", "grad_norm"):
            assert float(named[key]) == pytest.approx(float(getattr(result, key)), rel=1e-12), key
        for name, p in model.named_parameters():
            torch.testing.assert_close(runner.state[name], p.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("randomness", "count"), [("same", 1), ("fresh", 2)])
def test_the_same_draw_is_made_once(randomness: Any, count: int) -> None:
    step = make(Noisy(nn.Dropout(0.4)), "sgd", sx.Semantics(randomness=randomness))
    graph = sx.capture(step, batches(1)[0]).programs["step"].graph
    assert len(drawn_nodes(graph)) == count


@pytest.mark.parametrize("generator", ["philox", "torch"])
def test_the_factors_of_dropout_are_computed_once(generator: Any) -> None:
    step = make(Noisy(nn.Dropout(0.4)), "sgd", sx.Semantics(generator=generator))
    graph = sx.capture(step, batches(1)[0]).programs["step"].graph
    backward = torch.ops.aten.native_dropout_backward.default
    assert bool(graph.find_nodes(op="call_function", target=backward)) == (generator == "torch")
    if generator == "philox":
        (mask,) = drawn_nodes(graph)
        casts = [n for n in mask.users if n.target == torch.ops.aten._to_copy.default]
        (cast,) = casts
        (factors,) = cast.users
        assert len(factors.users) == 4  # forward and backward of both passes


def test_a_draw_of_torch_that_depends_on_values_is_refused_or_fresh() -> None:
    torch.manual_seed(0)
    model = Noisy(OfValues()).double()
    same, fresh = (
        make(model, "sgd", sx.Semantics(generator="torch", randomness=randomness))
        for randomness in ("same", "fresh")
    )
    with pytest.raises(sx.CaptureError, match=r"aten\.bernoulli.*randomness=\"fresh\""):
        sx.capture(same, batches(1, torch.float64)[0])
    assert len(sx.capture(fresh, batches(1, torch.float64)[0]).random_ops) == 2


def test_the_graph_goes_on_where_the_eager_step_stands() -> None:
    step = make(Noisy(nn.Dropout(0.4)).double(), "sgd")
    for batch in batches(3, torch.float64):
        step(*batch)
    captured = sx.capture(step, batches(1, torch.float64)[0])
    assert int(captured.state["counter.step"]) == 3
    assert int(captured.state["rng.seed"]) == step.seed
    runner = Runner(captured)
    batch = batches(1, torch.float64)[0]
    assert float(runner.step(batch)["loss"]) == pytest.approx(float(step(*batch).loss), rel=1e-13)


def test_a_step_without_draws_has_neither_seed_nor_number() -> None:
    captured = sx.capture(make(Noisy(nn.Identity())), batches(1)[0])
    assert not {"rng.seed", "counter.step"} & {spec.name for spec in captured.contract.state}
    assert not {"rng.seed", "counter.step"} & set(captured.state)


class SamplingInEvaluation(Noisy):
    """Draws where it does not train, and only there."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.training else x + torch.randn_like(x)


def test_evaluation_may_draw() -> None:
    """From streams of its own, by the step number, which the step counts for it."""
    captured = sx.capture(make(SamplingInEvaluation(nn.Identity())), batches(1)[0])
    contract = captured.contract
    assert "counter.step" in contract.program("step").feeds.values()
    for program in ("evaluate", "evaluate_loss"):
        assert "rng.seed" in contract.program(program).inputs
        assert not contract.program(program).feeds
        (node,) = drawn_nodes(captured.programs[program].graph)[:1]
        assert int(node.args[3]) >= 2**31
    assert not drawn_nodes(captured.programs["step"].graph)


@pytest.mark.parametrize("library", ["random", "numpy.random"])
def test_numbers_from_outside_torch_are_refused(library: str) -> None:
    """They would be constants of the graph."""

    class Outside(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            factor = random.random() if library == "random" else np.random.rand()
            return super().forward(x * factor)

    states = random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(sx.CaptureError, match=f"draws from {library} in its forward"):
        sx.capture(make(Outside(nn.Identity())), batches(1)[0])
    assert states == (random.getstate(), np.random.get_state()[1].tolist())
