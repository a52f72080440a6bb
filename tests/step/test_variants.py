"""GSAM, Friendly SAM, LookSAM, periodic SAM, several ascent steps: eager, against plain loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_export as sx

RHO, LR, MOMENTUM = 0.1, 0.05, 0.9

TINY = 1e-12
"""Added to each norm that is divided by, as it is documented."""

Step = tuple[Tensor, Tensor]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(count: int = 7) -> list[Step]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(10, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (10,), generator=generator),
        )
        for _ in range(count)
    ]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


class Plain:
    """The model's weights as one vector, and SGD with momentum by hand."""

    def __init__(self) -> None:
        self.model = model()
        self.w = flat([p.detach() for p in self.model.parameters()])
        self.velocity: Tensor | None = None

    def gradient(self, at: Tensor, batch: Step) -> Tensor:
        nn.utils.vector_to_parameters(at, self.model.parameters())
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        return flat(torch.autograd.grad(loss, list(self.model.parameters())))

    def update(self, g: Tensor) -> None:
        self.velocity = g if self.velocity is None else MOMENTUM * self.velocity + g
        self.w = self.w - LR * self.velocity


def gsam(alpha: float) -> Callable[[Plain, int, Step], Tensor]:
    def step(plain: Plain, number: int, batch: Step) -> Tensor:
        g = plain.gradient(plain.w, batch)
        g_adv = plain.gradient(plain.w + RHO * g / (g.norm() + TINY), batch)
        u = g_adv / (g_adv.norm() + TINY)
        along = (g @ u) * u
        return g_adv - alpha * (g - along)

    return step


def friendly(sigma: float, lmbda: float) -> Callable[[Plain, int, Step], Tensor]:
    average: list[Tensor] = []

    def step(plain: Plain, number: int, batch: Step) -> Tensor:
        g = plain.gradient(plain.w, batch)
        d = g - sigma * average[0] if average else g
        average[:] = [lmbda * average[0] + (1 - lmbda) * g if average else g]
        return plain.gradient(plain.w + RHO * d / (d.norm() + TINY), batch)

    return step


def looksam(alpha: float, every: int) -> Callable[[Plain, int, Step], Tensor]:
    kept: list[Tensor] = []

    def step(plain: Plain, number: int, batch: Step) -> Tensor:
        g = plain.gradient(plain.w, batch)
        if number % every:
            return g + alpha * g.norm() / (kept[0].norm() + TINY) * kept[0]
        g_adv = plain.gradient(plain.w + RHO * g / (g.norm() + TINY), batch)
        u = g / (g.norm() + TINY)
        kept[:] = [g_adv - (g_adv @ u) * u]
        return g_adv

    return step


def periodic(every: int) -> Callable[[Plain, int, Step], Tensor]:
    def step(plain: Plain, number: int, batch: Step) -> Tensor:
        g = plain.gradient(plain.w, batch)
        return g if number % every else plain.gradient(plain.w + RHO * g / (g.norm() + TINY), batch)

    return step


def several(count: int) -> Callable[[Plain, int, Step], Tensor]:
    def step(plain: Plain, number: int, batch: Step) -> Tensor:
        point = plain.w
        for _ in range(count):
            g = plain.gradient(point, batch)
            point = point + RHO / count * g / (g.norm() + TINY)
        return plain.gradient(point, batch)

    return step


CASES: dict[str, tuple[dict[str, Any], Callable[[], Callable[[Plain, int, Step], Tensor]]]] = {
    "GSAM": ({"variant": sx.GSAM(0.3)}, lambda: gsam(0.3)),
    "Friendly SAM": ({"variant": sx.FriendlySAM(0.8, 0.6)}, lambda: friendly(0.8, 0.6)),
    "LookSAM": ({"variant": sx.LookSAM(0.5), "every": 3}, lambda: looksam(0.5, 3)),
    "periodic": ({"every": 3}, lambda: periodic(3)),
    "three ascent steps": ({"ascent_steps": 3}, lambda: several(3)),
}


def plain_run(case: str, count: int) -> Tensor:
    plain, step = Plain(), CASES[case][1]()
    for number, batch in enumerate(batches(count)):
        plain.update(step(plain, number, batch))
    return plain.w


def sam_of(own: nn.Module, **options: Any) -> sx.SAM:
    return sx.SAM(own.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=MOMENTUM, **options)


def train_step(**options: Any) -> sx.TrainStep:
    own = model()
    return sx.TrainStep(own, nn.CrossEntropyLoss(), sam_of(own, **options))


def weights(own: nn.Module) -> Tensor:
    return flat([p.detach() for p in own.parameters()])


@pytest.mark.parametrize("case", CASES)
def test_a_train_step_equals_a_plain_loop(case: str) -> None:
    step = train_step(**CASES[case][0])
    for x, y in batches():
        step(x, y)
    torch.testing.assert_close(weights(step.model), plain_run(case, 7), rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_the_optimizer_with_a_closure_equals_a_plain_loop(case: str) -> None:
    own = model()
    optimizer = sam_of(own, **CASES[case][0])

    for x, y in batches():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = nn.functional.cross_entropy(own(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    torch.testing.assert_close(weights(own), plain_run(case, 7), rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_equals_a_plain_loop(case: str) -> None:
    step = train_step(**CASES[case][0])
    session = sx.load(sx.capture(step, batches()[0]), target="torchscript")
    for x, y in batches():
        session.step(x, y)
    state = session.state
    found = flat([torch.tensor(state[name]) for name, _ in step.model.named_parameters()])
    torch.testing.assert_close(found, plain_run(case, 7), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"variant": sx.GSAM(0.0)}, {}),
        ({"variant": sx.FriendlySAM(0.0)}, {}),
        ({"variant": sx.LookSAM(0.0), "every": 2}, {"every": 2}),
    ],
    ids=["GSAM", "Friendly SAM", "LookSAM"],
)
def test_with_its_number_at_zero_a_variant_is_sam(
    options: dict[str, Any], limit: dict[str, Any]
) -> None:
    one, other = train_step(**options), train_step(**limit)
    for x, y in batches():
        one(x, y)
        other(x, y)
    torch.testing.assert_close(weights(one.model), weights(other.model), rtol=0, atol=1e-15)


def test_without_a_radius_no_variant_moves_away_from_the_base_optimizer() -> None:
    for options in ({"variant": sx.GSAM()}, {"variant": sx.FriendlySAM()}, {"ascent_steps": 2}):
        own, plain = model(), model()
        sam = sx.SAM(own.parameters(), torch.optim.SGD, rho=0.0, lr=LR, **options)
        step = sx.TrainStep(own, nn.CrossEntropyLoss(), sam)
        base = torch.optim.SGD(plain.parameters(), lr=LR)
        for x, y in batches():
            step(x, y)
            base.zero_grad()
            nn.functional.cross_entropy(plain(x), y).backward()
            base.step()
        # GSAM divides by a norm plus 1e-12, which leaves that part of what it takes away.
        torch.testing.assert_close(weights(own), weights(plain), rtol=0, atol=1e-11)


def test_gsam_leaves_the_perturbed_loss_to_first_order() -> None:
    """What it takes away is orthogonal to ``g_adv``."""
    plain = Plain()
    x, y = batches()[0]
    g = plain.gradient(plain.w, (x, y))
    g_adv = plain.gradient(plain.w + RHO * g / (g.norm() + TINY), (x, y))
    variant = sx.GSAM(1.0)
    found, _ = variant.descended({"w": g}, {"w": g_adv}, {})
    taken = found["w"] - g_adv
    assert taken.norm() > 0.01 * g.norm()
    assert abs(float(taken @ g_adv)) < 1e-11  # the norm that it divides by is 1e-12 too large


def test_the_radius_of_gsam_goes_with_the_learning_rate() -> None:
    limits = {"lr_max": 0.1, "lr_min": 0.0, "rho_max": 0.2, "rho_min": 0.1}
    assert sx.GSAM.radius(0.1, **limits) == pytest.approx(0.2)
    assert sx.GSAM.radius(0.05, **limits) == pytest.approx(0.15)
    with pytest.raises(sx.StepConfigError, match="lr_max must be above lr_min"):
        sx.GSAM.radius(0.1, **{**limits, "lr_min": 0.1})


@pytest.mark.parametrize("case", ["Friendly SAM", "LookSAM", "periodic"])
def test_a_state_dict_carries_what_a_variant_keeps(case: str) -> None:
    given = batches()
    step = train_step(**CASES[case][0])
    for x, y in given[:4]:
        step(x, y)
    other = train_step(**CASES[case][0])
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    for x, y in given[4:]:
        other(x, y)
    torch.testing.assert_close(weights(other.model), plain_run(case, 7), rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", ["GSAM", "Friendly SAM", "LookSAM", "periodic"])
def test_the_loop_of_two_calls_knows_the_variant(case: str) -> None:
    own = model()
    optimizer = sam_of(own, **CASES[case][0])
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(own(x), y).backward()
        if optimizer.is_perturbed:
            optimizer.first_step(zero_grad=True)
            nn.functional.cross_entropy(own(x), y).backward()
            optimizer.second_step()
        else:
            optimizer.base_step()
    torch.testing.assert_close(weights(own), plain_run(case, 7), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": sx.LookSAM()}, r"Give SAM\(..., every=5\)"),
        ({"variant": sx.FriendlySAM(), "ascent_steps": 2}, "ascent_steps=1"),
        ({"variant": "gsam"}, "expected GSAM"),
        ({"every": 0}, "every=0: expected a whole number"),
        ({"every": 2.0}, "every=2.0: expected a whole number"),
        ({"ascent_steps": True}, "ascent_steps=True: expected a whole number"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sx.StepConfigError, match=message):
        train_step(**options)


@pytest.mark.parametrize(
    ("kind", "numbers", "message"),
    [
        (sx.GSAM, {"alpha": -1.0}, r"GSAM\(alpha=-1.0\): expected a finite number, at least 0"),
        (sx.FriendlySAM, {"lmbda": 1.5}, r"FriendlySAM\(lmbda=1.5\): .* from 0 to 1"),
        (sx.LookSAM, {"alpha": float("nan")}, r"LookSAM\(alpha=nan\)"),
    ],
)
def test_a_number_out_of_its_range_is_refused(
    kind: Any, numbers: dict[str, float], message: str
) -> None:
    with pytest.raises(sx.StepConfigError, match=message):
        kind(**numbers)


def test_a_step_that_is_not_finite_keeps_what_was_remembered() -> None:
    given = batches()
    step = train_step(variant=sx.FriendlySAM())
    session = sx.load(sx.capture(step, given[0]), target="torchscript")
    for run in (step, session.step):
        run(*given[0])
    before = {p: {k: v.clone() for k, v in own.items()} for p, own in step.optimizer.memory.items()}
    state = session.state
    x = given[1][0].clone()
    x[0, 0] = torch.nan
    assert not bool(step(x, given[1][1]).finite)
    assert not bool(session.step(x, given[1][1]).finite)
    for p, own in before.items():
        assert torch.equal(own["average"], step.optimizer.memory[p]["average"])
    names = [name for name in state if name.startswith("memory.")]
    assert len(names) == 4
    assert all((session.state[name] == state[name]).all() for name in names)


@pytest.mark.parametrize("case", ["Friendly SAM", "LookSAM", "periodic"])
def test_state_goes_both_ways_in_the_middle(case: str) -> None:
    """Eager for four steps, the session for two, eager again for one."""
    given = batches()
    step = train_step(**CASES[case][0])
    session = sx.load(sx.capture(step, given[0]), target="torchscript")
    for x, y in given[:4]:
        step(x, y)
    session.load_from(step)
    for x, y in given[4:6]:
        session.step(x, y)
    session.load_into(step)
    step(*given[6])
    torch.testing.assert_close(weights(step.model), plain_run(case, 7), rtol=0, atol=1e-12)


def test_a_session_refuses_an_optimizer_of_another_kind() -> None:
    session = sx.load(sx.capture(train_step(every=3), batches()[0]), target="torchscript")
    with pytest.raises(sx.SessionError, match="every is 1 and in the graph 3"):
        session.load_from(train_step())
    with pytest.raises(sx.SessionError, match=r"variant is 'GSAM\(alpha=0.4\)' and in the graph"):
        session.load_from(train_step(every=3, variant=sx.GSAM()))


def test_a_checkpoint_keeps_the_place_in_the_period(tmp_path: Any) -> None:
    given = batches()
    captured = sx.capture(train_step(**CASES["LookSAM"][0]), given[0])
    first = sx.load(captured, target="onnx")
    for x, y in given[:5]:
        first.step(x, y)
    first.save(tmp_path / "run.ckpt")
    second = sx.load(captured, target="torchscript")
    second.restore(tmp_path / "run.ckpt")
    for x, y in given[5:]:
        second.step(x, y)
    names = [name for name, _ in model().named_parameters()]
    found = flat([torch.tensor(second.state[name]) for name in names])
    torch.testing.assert_close(found, plain_run("LookSAM", 7), rtol=0, atol=1e-12)


def test_the_scripted_module_keeps_the_period_by_itself() -> None:
    """As C++ calls it: ``step`` alone, with no session beside it."""
    given = batches()
    step = train_step(every=3)
    session = sx.load(sx.capture(step, given[0]), target="torchscript")
    module = session._engine._module  # type: ignore[attr-defined]
    for x, y in given:
        module.step(x, y)
    names = [name for name, _ in step.model.named_parameters()]
    held = dict(module.named_parameters())
    found = flat([held[name].detach() for name in names])
    torch.testing.assert_close(found, plain_run("periodic", 7), rtol=0, atol=1e-12)


def test_the_stock_training_api_refuses_a_period() -> None:
    own = model().float()
    step = sx.TrainStep(own, nn.CrossEntropyLoss(), sam_of(own, every=3))
    x, y = batches()[0]
    with pytest.raises(sx.LoweringError, match="one training model, and periodic SAM"):
        sx.load(sx.capture(step, (x.float(), y)), target="ort-artifacts")
