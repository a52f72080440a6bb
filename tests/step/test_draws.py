"""Random operators of a model under the step's own generator, against the oracle's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sam_export as sx
from sam_export.parity.oracle_random import OracleDraws
from sam_export.step.draws import Draws
from sam_export.step.random_operators import FORMS
from tests.step.test_sam import batches

X = torch.linspace(-2, 2, 35, dtype=torch.float64).reshape(5, 7)
P = torch.sigmoid(X)
LSTM = nn.LSTM(7, 4, num_layers=2, dropout=0.5, batch_first=True).double()
ENCODER = nn.TransformerEncoderLayer(7, 1, 9, dropout=0.4, batch_first=True).double()

OPERATORS: dict[str, Callable[[], Tensor]] = {
    "dropout": lambda: nn.functional.dropout(X, 0.3),
    "dropout in place": lambda: nn.functional.dropout(X.clone(), 0.3, inplace=True),
    "native_dropout": lambda: torch.native_dropout(X, 0.3, True)[0],
    "mask of native_dropout": lambda: torch.native_dropout(X, 0.3, True)[1],
    "native_dropout of everything": lambda: torch.native_dropout(X, 1.0, True)[0],
    "native_dropout without training": lambda: torch.native_dropout(X, 0.3, False)[0],
    "dropout1d": lambda: nn.functional.dropout1d(X[None], 0.5),
    "dropout2d": lambda: nn.functional.dropout2d(X[None, None], 0.5),
    "alpha_dropout": lambda: nn.functional.alpha_dropout(X, 0.3, training=True),
    "feature_alpha_dropout": lambda: nn.functional.feature_alpha_dropout(X, 0.3, training=True),
    "bernoulli of probabilities": lambda: torch.bernoulli(P),
    "bernoulli with p": lambda: torch.bernoulli(X, 0.2),
    "bernoulli_": lambda: X.clone().bernoulli_(0.2),
    "bernoulli_ of probabilities": lambda: torch.empty(5, 7).bernoulli_(P),
    "rand": lambda: torch.rand(5, 7),
    "rand float64": lambda: torch.rand(5, 7, dtype=torch.float64),
    "rand float16": lambda: torch.rand(5, 7, dtype=torch.float16),
    "rand of no dimension": lambda: torch.rand(()),
    "rand of no elements": lambda: torch.rand(0, 3),
    "rand_like": lambda: torch.rand_like(X),
    "rand_like bfloat16": lambda: torch.rand_like(X, dtype=torch.bfloat16),
    "uniform_": lambda: X.clone().uniform_(-2, 3),
    "uniform_ float32": lambda: X.float().uniform_(1, 2),
    "randn": lambda: torch.randn(5, 7, dtype=torch.float64),
    "randn float32": lambda: torch.randn(5, 7),
    "randn_like": lambda: torch.randn_like(X),
    "normal_": lambda: X.clone().normal_(1.0, 0.5),
    "normal of tensors": lambda: torch.normal(X, P),
    "normal of a mean": lambda: torch.normal(X, 2.0),
    "normal of a deviation": lambda: torch.normal(0.5, P),
    "normal of numbers": lambda: torch.normal(0.5, 2.0, (3, 4)),
    "exponential_": lambda: X.clone().exponential_(2.0),
    "randint": lambda: torch.randint(10, (5, 7)),
    "randint with low": lambda: torch.randint(-5, 10, (5, 7), dtype=torch.int32),
    "randint_like": lambda: torch.randint_like(X, 10),
    "randint_like with low": lambda: torch.randint_like(X, -5, 10),
    "random_ of floats": lambda: X.clone().random_(),
    "random_ of integers": lambda: torch.empty(5, 7, dtype=torch.int64).random_(),
    "random_ of int8": lambda: torch.empty(5, 7, dtype=torch.int8).random_(),
    "random_ of bool": lambda: torch.empty(5, 7, dtype=torch.bool).random_(),
    "random_ to": lambda: torch.empty(5, 7).random_(12),
    "random_ from to": lambda: torch.empty(5, 7).random_(-3, 12),
    "randperm": lambda: torch.randperm(9),
    "rrelu": lambda: nn.functional.rrelu(X, training=True),
    "rrelu_": lambda: nn.functional.rrelu(X.clone(), 0.1, 0.2, training=True, inplace=True),
    "rrelu in evaluation": lambda: nn.functional.rrelu(X),
    "gumbel_softmax": lambda: nn.functional.gumbel_softmax(X),
    "lstm": lambda: LSTM(X[None])[0].detach(),
    "encoder layer": lambda: ENCODER(X[None]).detach(),
    "attention": lambda: nn.functional.scaled_dot_product_attention(X, X, X, dropout_p=0.4),
}


def draws(step: int = 0, same: bool = True) -> Draws:
    return Draws(torch.tensor(11), torch.tensor(step), same=same)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_draws_what_the_oracle_draws(name: str) -> None:
    """Second in a row, so that numbering counts; dtype, shape and values."""
    with draws(step=3):
        torch.rand(3)
        found = OPERATORS[name]()
    with OracleDraws(11, 3):
        torch.rand(3)
        expected = OPERATORS[name]()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    exact = not found.is_floating_point() or not any(part in name for part in ("norm", "randn"))
    # The oracle's logarithm and cosine are NumPy's.
    tolerance = 0 if exact and "exp" not in name and "gumbel" not in name else 1e-14
    if found.dtype != torch.float64 and tolerance:
        tolerance = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_every_form_is_in_the_table() -> None:
    seen = set()

    class Watch(Draws):
        def __torch_dispatch__(self, func: Any, *arguments: Any) -> Any:
            seen.add(func)
            return super().__torch_dispatch__(func, *arguments)

    with Watch(torch.tensor(0), torch.tensor(0), same=False):
        for run in OPERATORS.values():
            run()
    assert set(FORMS) <= seen, set(FORMS) - seen


def test_masks_do_not_depend_on_the_dtype() -> None:
    masks = []
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        with draws():
            masks.append(nn.functional.dropout(torch.ones(1000, dtype=dtype), 0.3) != 0)
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_torchs_generator_is_left_alone_and_has_no_say() -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with draws():
            results.append(torch.rand(5))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.initial_seed() == seed
    assert torch.equal(*results)


def test_a_draw_may_be_written_to() -> None:
    with draws() as same:
        first = torch.rand(4).mul_(0)
        same.at("descent")
        again = torch.rand(4)
    assert float(first.sum()) == 0
    assert float(again.sum()) > 0


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "an operator without a form": (lambda: torch.multinomial(P, 2), "aten.multinomial"),
    "a generator of its own": (
        lambda: torch.rand(3, generator=torch.Generator()),
        "given a torch.Generator",
    ),
    "a seed in between": (lambda: (torch.manual_seed(0), torch.rand(3)), "seeds torch's generator"),
    "a wrong probability": (lambda: torch.bernoulli(X, 1.5), "probability of 1.5"),
    "complex numbers": (lambda: torch.rand(3, dtype=torch.complex64), "complex64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_drawn_is_refused(case: str) -> None:
    run, message = REFUSED[case]
    before = torch.get_rng_state()
    with pytest.raises(sx.StepConfigError, match=message), draws():
        run()
    assert torch.equal(torch.get_rng_state(), before)


# -- in an eager step ---------------------------------------------------------------------------


class Noisy(nn.Module):
    """Dropout between two layers; optionally recomputed in the backward pass."""

    def __init__(self, recompute: bool | None = None, p: float = 0.5) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)
        self.recompute = recompute
        self.drop = nn.Dropout(p)
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return torch.tanh(self.drop(self.first(x))) + 0.1 * torch.randn(x.shape[0], 1)

        if self.recompute is None:
            hidden = inner(x)
        else:
            hidden = checkpoint(inner, x, use_reentrant=self.recompute)
        mask = self.drop(torch.ones(x.shape[0], 16))
        self.masks.append(mask.detach() != 0)
        return self.last(hidden * mask)


def step_of(model: nn.Module, seed: int | None = 4, **semantics: Any) -> sx.TrainStep:
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    return sx.TrainStep(
        model, nn.CrossEntropyLoss(), sam, semantics=sx.Semantics(**semantics), seed=seed
    )


def test_same_and_fresh_masks() -> None:
    for randomness in ("same", "fresh"):
        torch.manual_seed(0)
        model = Noisy()
        step = step_of(model, randomness=randomness)
        for batch in batches(2):
            step(*batch)
        assert torch.equal(model.masks[0], model.masks[1]) == (randomness == "same")
        assert not torch.equal(model.masks[0], model.masks[2])


def test_seed_and_step_number_say_everything() -> None:
    torch.manual_seed(0)
    first = step_of(Noisy())
    for batch in batches(3):
        first(*batch)
    torch.manual_seed(0)
    second = step_of(Noisy())
    torch.manual_seed(99)
    second.step_count = 2
    second(*batches(3)[2])
    assert torch.equal(first.model.masks[-1], second.model.masks[-1])
    other = step_of(Noisy(), seed=5)
    other.step_count = 2
    other(*batches(3)[2])
    assert not torch.equal(first.model.masks[-1], other.model.masks[-1])


def test_the_seed_is_that_of_torch_unless_it_is_given() -> None:
    torch.manual_seed(123)
    assert step_of(Noisy(), seed=None).seed == 123
    assert step_of(Noisy(), seed=2**64 - 1).seed == -1
    for seed in (2**64, -(2**63) - 1, 1.5, True):
        with pytest.raises(sx.StepConfigError, match="64 bits"):
            step_of(Noisy(), seed=seed)  # type: ignore[arg-type]


def test_state_dict_holds_seed_and_step_number() -> None:
    step = step_of(Noisy())
    step(*batches(1)[0])
    other = step_of(Noisy(), seed=77)
    other.load_state_dict(step.state_dict())
    assert (other.seed, other.step_count) == (4, 1)


def test_a_step_that_is_skipped_counts_and_one_that_raises_does_not() -> None:
    x, y = batches(1)[0]
    step = step_of(Noisy())
    assert not bool(step(x * float("nan"), y).finite)
    assert step.step_count == 1
    step = step_of(Noisy(), on_nonfinite="raise")
    with pytest.raises(sx.StepConfigError, match="not finite"):
        step(x * float("nan"), y)
    assert step.step_count == 0


@pytest.mark.parametrize("randomness", ["same", "fresh"])
def test_checkpointed_layers_draw_the_same_again(randomness: str) -> None:
    """And find the perturbed weights again: the backward pass belongs to the same call."""
    torch.manual_seed(0)
    plain = Noisy()
    recomputed = copy.deepcopy(plain)
    recomputed.recompute = False
    steps = [step_of(model, randomness=randomness) for model in (plain, recomputed)]
    for batch in batches(3):
        results = [step(*batch) for step in steps]
        assert float(results[0].perturbed_loss) == float(results[1].perturbed_loss)
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_reentrant_checkpoints_are_refused() -> None:
    """They would give no gradients to the parameters inside, which would then count as unused."""
    step = step_of(Noisy(recompute=True))
    x, y = batches(1)[0]
    for run in (step, lambda *batch: sx.capture(step, batch)):
        with pytest.raises(sx.StepConfigError, match="use_reentrant=False"):
            run(x.clone().requires_grad_(), y)


def test_a_model_that_begins_to_draw_later_is_noticed() -> None:
    """After a first step without draws there is no `Draws` to slow the step down."""
    torch.manual_seed(0)

    class Later(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            if self.drop.p == 0:
                return self.last(torch.tanh(self.first(x)))
            return super().forward(x)

    model = Later(p=0.0)
    step = step_of(model)
    step(*batches(2)[0])
    model.drop.p = 0.5
    twin = copy.deepcopy(step)
    twin._draws_nothing = False
    before = torch.get_rng_state()
    results = [each(*batches(2)[1]) for each in (step, twin)]
    assert float(results[0].perturbed_loss) == float(results[1].perturbed_loss)
    assert torch.equal(step.model.masks[-1], twin.model.masks[-1])
    assert torch.equal(torch.get_rng_state(), before)


def test_passes_that_draw_differently_are_refused() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(nn.functional.dropout(x, 0.1 * self.calls))

    model = Uneven()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(sx.StepConfigError, match=r"Draw 0 is bernoulli\(0.9\).*bernoulli\(0.8\)"):
        step_of(model)(*batches(1)[0])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    step_of(Uneven(), randomness="fresh")(*batches(1)[0])


def test_an_optimizer_may_draw_too() -> None:
    class Langevin(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(torch.randn_like(p), alpha=1e-3)

    results = []
    for torch_seed in (1, 2):
        torch.manual_seed(0)
        model = Noisy()
        sam = sx.SAM(model.parameters(), Langevin, rho=0.1, lr=0.1)
        step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam, seed=4)
        torch.manual_seed(torch_seed)
        step(*batches(1)[0])
        results.append(model.first.weight.detach().clone())
    assert torch.equal(*results)
