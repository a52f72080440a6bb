"""`TrainStep` run eagerly: section 4 of the design, row by row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from tests.step.test_sam import OPTIMIZERS, batches, plain_loop, small_model


class WithStatistics(nn.Module):
    """BatchNorm and dropout, so that both passes matter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))


def make(
    model: nn.Module, semantics: sx.Semantics | None = None, **options: Any
) -> tuple[sx.TrainStep, sx.SAM]:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, **options}
    optimizer = sx.SAM(model.parameters(), torch.optim.SGD, **options)
    return sx.TrainStep(model, nn.CrossEntropyLoss(), optimizer, semantics=semantics), optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eager_loop_semantics_equal_the_classic_loop_bit_for_bit(name: str) -> None:
    base, options = OPTIMIZERS[name]
    torch.manual_seed(3)
    ours = WithStatistics()
    plain = copy.deepcopy(ours)
    step = sx.TrainStep(
        ours,
        nn.CrossEntropyLoss(),
        sx.SAM(ours.parameters(), base, rho=0.05, **options),
        semantics=sx.Semantics.eager_loop(),
    )
    torch.manual_seed(7)
    losses = [float(step(x, y).loss) for x, y in batches(6)]
    torch.manual_seed(7)
    assert losses == plain_loop(plain, base(plain.parameters(), **options), 0.05, batches(6))
    for (key, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert int(ours.norm.num_batches_tracked) == 12


def test_running_statistics_are_updated_once_by_default() -> None:
    torch.manual_seed(3)
    model = WithStatistics()
    expected = copy.deepcopy(model)
    step, _ = make(model)
    x, y = batches(1)[0]
    step(x, y)
    expected.norm(expected.first(x))  # one forward pass at w
    assert int(model.norm.num_batches_tracked) == 1
    assert torch.equal(model.norm.running_mean, expected.norm.running_mean)
    assert torch.equal(model.norm.running_var, expected.norm.running_var)


def test_both_passes_see_the_same_dropout_mask_by_default() -> None:
    """With rho = 0 the passes are the same function, so their losses tell the masks apart."""
    x, y = batches(1)[0]
    for semantics, same in (
        (sx.Semantics(), True),
        (sx.Semantics(randomness="fresh"), False),
    ):
        torch.manual_seed(3)
        step, _ = make(WithStatistics(), semantics, rho=0.0)
        result = step(x, y)
        assert (float(result.loss) == float(result.perturbed_loss)) is same


def test_rho_zero_is_the_base_optimizer() -> None:
    ours, plain = small_model(), small_model()
    step, _ = make(ours, rho=0.0)
    base = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for x, y in batches(4):
        step(x, y)
        base.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        base.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_reported_values_are_those_at_w() -> None:
    model = small_model(torch.float64)
    step, _ = make(model, rho=0.2)
    x, y = batches(1, torch.float64)[0]
    loss = nn.functional.cross_entropy(model(x), y)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    loss = loss.detach()
    norm = torch.cat([g.flatten() for g in grads]).norm()
    outputs = model(x).detach()
    result = step(x, y)
    assert float(result.loss) == float(loss)
    assert float(result.grad_norm) == pytest.approx(float(norm), rel=1e-14)
    assert float(result.perturbation_norm) == pytest.approx(0.2, rel=1e-12)
    assert float(result.perturbed_loss) > float(loss)
    assert torch.equal(result.outputs, outputs)


def state_of(step: sx.TrainStep) -> list[Tensor]:
    slots = [
        value
        for entries in step.optimizer.base_optimizer.state.values()
        for value in entries.values()
    ]
    return [t.detach().clone() for t in (*step.model.state_dict().values(), *slots)]


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    torch.manual_seed(3)
    step, _ = make(WithStatistics())
    x, y = batches(1)[0]
    step(x, y)
    before = state_of(step)
    bad = x.clone()
    bad[0, 0] = float("nan")
    assert not bool(step(bad, y).finite)
    for a, b in zip(before, state_of(step), strict=True):
        assert torch.equal(a, b)
    assert bool(step(x, y).finite)


def test_not_finite_can_raise_or_be_ignored() -> None:
    x, y = batches(1)[0]
    step, _ = make(small_model(), sx.Semantics(on_nonfinite="raise"))
    before = state_of(step)
    with pytest.raises(sx.StepConfigError, match=r"not finite.*nothing was changed"):
        step(x * float("inf"), y)
    for a, b in zip(before, state_of(step), strict=True):
        assert torch.equal(a, b)
    step, _ = make(small_model(), sx.Semantics(on_nonfinite="ignore"))
    step(x * float("nan"), y)
    assert not torch.isfinite(next(iter(step.model.parameters()))).all()


class Peculiar(nn.Module):
    """A frozen, an unused and a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 3, bias=False)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.head = nn.Linear(5, 3, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x) * self.frozen + self.head(x)


def test_frozen_unused_and_tied_parameters() -> None:
    torch.manual_seed(0)
    ours = Peculiar()
    plain = copy.deepcopy(ours)
    step, _ = make(ours)
    base = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for x, y in batches(3):
        step(x, y)
    plain_loop(plain, base, 0.05, batches(3))
    assert torch.equal(ours.embed.weight, plain.embed.weight)
    assert ours.head.weight is ours.embed.weight
    assert torch.equal(ours.frozen, plain.frozen)
    assert torch.equal(ours.unused, torch.ones(2))


class SharedLayer(nn.Module):
    """One layer under two names, and a buffer under two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.again = self.first
        self.norm = nn.BatchNorm1d(5)
        self.norm_too = self.norm
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm_too(self.norm(self.again(torch.relu(self.first(x))))))


def test_a_layer_under_two_names_stays_the_models() -> None:
    torch.manual_seed(0)
    ours = SharedLayer().double()
    plain = copy.deepcopy(ours)
    before = [id(tensor) for tensor in (*ours.parameters(), *ours.buffers())]
    loop = sx.Semantics.eager_loop()
    step, _ = make(ours, loop)
    base = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for x, y in batches(3, torch.float64):
        step(x, y)
    plain_loop(plain, base, 0.05, batches(3, torch.float64))
    assert [id(tensor) for tensor in (*ours.parameters(), *ours.buffers())] == before
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_decay_in_ascent_moves_the_perturbation() -> None:
    x, y = batches(1, torch.float64)[0]
    model = small_model(torch.float64)
    step, _ = make(model, sx.Semantics(decay_in_ascent=True), weight_decay=0.3)
    loss = nn.functional.cross_entropy(model(x), y)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    decayed = [g + 0.3 * p.detach() for g, p in zip(grads, model.parameters(), strict=True)]
    norm = torch.cat([g.flatten() for g in decayed]).norm()
    assert float(step(x, y).grad_norm) == pytest.approx(float(norm), rel=1e-14)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"logits": self.a(left) + self.b(right), "extra": self.a(left)}


def two_targets(output: dict[str, Tensor], label: Tensor, weight: Tensor) -> Tensor:
    return (nn.functional.cross_entropy(output["logits"], label, reduction="none") * weight).mean()


def test_several_inputs_and_targets_as_tuple_and_as_dict() -> None:
    torch.manual_seed(0)
    first = TwoInputs()
    second = copy.deepcopy(first)
    left, right = torch.randn(6, 5), torch.randn(6, 4)
    label, weight = torch.randint(0, 3, (6,)), torch.rand(6)
    results = []
    for model, call in (
        (first, lambda step: step(left, right, label, weight)),
        (
            second,
            lambda step: step({"right": right, "left": left, "label": label, "weight": weight}),
        ),
    ):
        optimizer = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        results.append(call(sx.TrainStep(model, two_targets, optimizer, num_targets=2)))
    assert float(results[0].loss) == float(results[1].loss)
    assert torch.equal(first.a.weight, second.a.weight)
    assert set(results[0].outputs) == {"logits", "extra"}


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net(x), y)


def test_the_model_may_return_the_loss() -> None:
    model = OwnLoss()
    optimizer = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before = model.net.weight.detach().clone()
    sx.TrainStep(model, None, optimizer)(*batches(1)[0])
    assert not torch.equal(before, model.net.weight)


def test_bad_steps_are_refused_with_a_reason() -> None:
    x, y = batches(1)[0]
    model = small_model()
    with pytest.raises(sx.StepConfigError, match=r"expected sam_export\.SAM"):
        sx.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[arg-type]
    step, _ = make(model)
    step.loss_fn = nn.CrossEntropyLoss(reduction="none")
    with pytest.raises(sx.StepConfigError, match=r"shape \[6\].*scalar"):
        step(x, y)
    step = sx.TrainStep(
        model, lambda output, target: output.detach().sum() + 0 * target.sum(), step.optimizer
    )
    with pytest.raises(sx.StepConfigError, match="depends on no trained parameter"):
        step(x, y)
    step, _ = make(small_model())
    with pytest.raises(sx.StepConfigError, match="nothing is left for the model"):
        step(x)
    with pytest.raises(sx.StepConfigError, match="empty"):
        step(x[:0], y[:0])
    with pytest.raises(sx.StepConfigError, match="expected a torch.Tensor"):
        step(x.numpy(), y)
    frozen = small_model().requires_grad_(False)
    with pytest.raises(sx.StepConfigError, match="no trainable parameter"):
        make(frozen)
    other = sx.SAM(small_model().parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(sx.StepConfigError, match="no parameter of Sequential"):
        sx.TrainStep(model, nn.CrossEntropyLoss(), other)
    with pytest.raises(sx.StepConfigError, match="running_stats='twice'"):
        sx.Semantics(running_stats="twice")  # type: ignore[arg-type]


def test_torch_compile_of_the_step_points_to_capture() -> None:
    step, _ = make(small_model())
    x, y = batches(1)[0]
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"sam_export\.capture"):
        torch.compile(step, fullgraph=True, backend="eager")(x, y)


class Averaging(nn.Module):
    """Keeps a running mean of its input, written into its buffer or assigned anew."""

    def __init__(self, assign: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("ema", torch.zeros(5))
        self.assign = assign

    def forward(self, x: Tensor) -> Tensor:
        new = 0.9 * self.ema + 0.1 * x.mean(0).detach()
        if self.assign:
            self.ema = new
        else:
            self.ema.copy_(new)
        return self.layer(x - new)


def test_a_buffer_that_is_assigned_anew_is_refused() -> None:
    """Its new value would be lost; written in place it is kept."""
    for assign in (False, True):
        model = Averaging(assign)
        step = sx.TrainStep(
            model, nn.CrossEntropyLoss(), sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        )
        batch = batches(1)[0]
        if assign:
            for run in (step, lambda *batch, step=step: sx.capture(step, batch)):
                with pytest.raises(sx.StepConfigError, match=r"'ema' anew.*self\.ema\.copy_"):
                    run(*batch)
            assert not model.ema.any()
        else:
            step(*batch)
            torch.testing.assert_close(model.ema, 0.1 * batch[0].mean(0))
            assert "ema" in sx.capture(step, batch).contract.program("step").feeds.values()
