"""`load_into` and `load_from`: the whole state to and from eager PyTorch, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sam_export as sx
from sam_export.artifact.contract import StepContract, TensorSpec
from sam_export.errors import SessionError
from sam_export.runtime.session import Session
from tests.artifact.toy import (
    ADAMW,
    MODEL,
    MOMENTUM,
    example_batch,
    make_contract,
    make_session,
    random_state,
)


class Toy(nn.Module):
    """The model of the toy contract."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(1, 3, generator=generator))
        self.bias = nn.Parameter(torch.randn(1, generator=generator))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return nn.functional.linear(x, self.weight, self.bias)


def sgd(model: nn.Module, **options: Any) -> sx.SAM:
    options = {"lr": 0.03, "momentum": 0.9, "rho": 0.07, **options}
    return sx.SAM(options.pop("params", model.parameters()), torch.optim.SGD, **options)


def adamw(model: nn.Module, **options: Any) -> sx.SAM:
    return sx.SAM(model.parameters(), torch.optim.AdamW, **{"lr": 0.03, "rho": 0.07, **options})


KINDS: dict[str, tuple[StepContract, Callable[..., sx.SAM]]] = {
    "sgd": (make_contract(), sgd),
    "adamw": (make_contract(slots=ADAMW, optimizer="AdamW"), adamw),
}


def train(model: nn.Module, optimizer: sx.SAM, steps: int, seed: int = 0) -> None:
    for index in range(steps):
        x, y = map(torch.tensor, example_batch(seed=seed + index))

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


def eager_bits(model: nn.Module, optimizer: Any) -> Any:
    """Everything that an eager run depends on, in a form that compares bit for bit."""

    def bits(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, tuple(value.shape), value.detach().numpy().tobytes()
        if isinstance(value, dict):
            return {key: bits(item) for key, item in value.items()}
        return [bits(item) for item in value] if isinstance(value, list) else value

    return bits(dict(model.state_dict())), bits(optimizer.state_dict())


def session_bits(session: Session) -> Any:
    state = {name: (value.dtype, value.tobytes()) for name, value in session.state.items()}
    return state, session.hyper, session.step_count


def whole_state(contract: StepContract, seed: int) -> dict[str, Any]:
    """Random state; step counts are whole numbers that float32 holds."""
    state = random_state(contract, seed)
    return {
        name: np.floor(np.abs(value)) if ".step." in name else value
        for name, value in state.items()
    }


@pytest.mark.parametrize("trained", [0, 3])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_random_state_goes_out_and_back_bit_for_bit(kind: str, seed: int, trained: int) -> None:
    contract, make = KINDS[kind]
    session = make_session(contract, state=whole_state(contract, seed))
    model = Toy()
    optimizer = make(model)
    train(model, optimizer, trained)
    objects = [id(p) for p in model.parameters()]
    session.load_into(model, optimizer)
    assert [id(p) for p in model.parameters()] == objects
    assert all(p.requires_grad for p in model.parameters())
    other = make_session(contract, state=whole_state(contract, seed + 100))
    other.load_from(model, optimizer)
    assert session_bits(other) == session_bits(session)
    for spec in MODEL:
        found = model.state_dict()[spec.name].numpy()
        assert found.tobytes() == session.state[spec.name].tobytes()
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    assert {group["rho"] for group in optimizer.param_groups} == {0.05}


@pytest.mark.parametrize("kind", KINDS)
def test_an_eager_run_goes_on_bit_for_bit_in_fresh_objects(kind: str) -> None:
    contract, make = KINDS[kind]
    model = Toy(seed=1)
    optimizer = make(model)
    train(model, optimizer, 5)
    session = make_session(contract)
    session.load_from(model, optimizer)
    assert session.hyper == {"lr": (0.03,), "rho": (0.07,)}
    fresh = Toy(seed=2)
    fresh_optimizer = make(fresh, lr=9.0, rho=9.0)
    session.load_into(fresh, fresh_optimizer)
    assert eager_bits(fresh, fresh_optimizer)[0] == eager_bits(model, optimizer)[0]
    train(model, optimizer, 5, seed=50)
    train(fresh, fresh_optimizer, 5, seed=50)
    assert eager_bits(fresh, fresh_optimizer)[0] == eager_bits(model, optimizer)[0]
    assert eager_bits(fresh, fresh_optimizer)[1] == eager_bits(model, optimizer)[1]


def test_new_slots_are_what_the_optimizer_itself_makes() -> None:
    contract, make = KINDS["adamw"]
    model, trained = Toy(), Toy()
    trained_optimizer = make(trained)
    train(trained, trained_optimizer, 1)
    optimizer = make(model)
    make_session(contract).load_into(model, optimizer)
    for one, other in zip(model.parameters(), trained.parameters(), strict=True):
        mine, theirs = optimizer.state[one], trained_optimizer.state[other]
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert (mine[key].dtype, mine[key].shape) == (value.dtype, value.shape)
            assert (mine[key].device, mine[key].stride()) == (value.device, value.stride())
            assert not mine[key].requires_grad


@pytest.mark.parametrize("capturable", [False, True])
def test_new_slots_are_on_the_parameters_device_but_for_the_step_count(capturable: bool) -> None:
    contract, make = KINDS["adamw"]
    model = Toy().to("meta")  # stands for a second device; copies to it are allowed
    optimizer = make(model, capturable=capturable)
    make_session(contract, state=whole_state(contract, 1)).load_into(model, optimizer)
    devices = {key: value.device.type for key, value in optimizer.state[model.weight].items()}
    step = "meta" if capturable else "cpu"
    assert devices == {"step": step, "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_slots_that_are_there_stay_the_same_objects() -> None:
    contract, make = KINDS["adamw"]
    model = Toy()
    optimizer = make(model)
    train(model, optimizer, 2)
    before = {p: dict(optimizer.state[p]) for p in model.parameters()}
    make_session(contract, state=whole_state(contract, 3)).load_into(model, optimizer)
    for p, entries in before.items():
        assert all(optimizer.state[p][key] is value for key, value in entries.items())
        assert float(entries["step"]) == float(np.float32(entries["step"]))
    assert optimizer.base_optimizer.state is optimizer.state


def test_slots_that_eager_has_not_made_get_their_first_value() -> None:
    contract, make = KINDS["sgd"]
    first = whole_state(contract, 1)
    first["slot.momentum_buffer.bias"][:] = 0.25
    session = make_session(contract, state=first)
    session.set_state(whole_state(contract, 2))
    model = Toy()
    session.load_from(model, make(model))
    for spec in MOMENTUM:
        assert session.state[spec.name].tobytes() == first[spec.name].tobytes()
    np.testing.assert_array_equal(session.state["weight"], model.weight.detach().numpy())


def test_the_state_of_eager_and_session_share_no_memory() -> None:
    contract, make = KINDS["sgd"]
    model = Toy()
    optimizer = make(model)
    session = make_session(contract)
    session.load_from(model, optimizer)
    before = session_bits(session)
    train(model, optimizer, 2)
    assert session_bits(session) == before
    session.load_into(model, optimizer)
    before = eager_bits(model, optimizer)
    session.step(*example_batch())
    assert eager_bits(model, optimizer) == before


def test_groups_keep_their_own_hyper_parameters() -> None:
    contract = make_contract(groups=(("weight",), ("bias",)))
    model = Toy()
    groups = [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "rho": 0.25}]
    optimizer = sgd(model, params=groups)
    session = make_session(contract)
    session.load_from(model, optimizer)
    assert session.hyper == {"lr": (0.5, 0.03), "rho": (0.07, 0.25)}
    session.step(*example_batch(), lr=[0.1, 0.2], rho=[0.3, 0.4])
    session.load_into(model, optimizer)
    assert [(group["lr"], group["rho"]) for group in optimizer.param_groups] == [
        (0.1, 0.3),
        (0.2, 0.4),
    ]
    assert optimizer.base_optimizer.param_groups is optimizer.param_groups


def test_a_learning_rate_that_is_a_tensor_stays_that_tensor() -> None:
    contract, make = KINDS["sgd"]
    model = Toy()
    optimizer = make(model)
    (group,) = optimizer.param_groups
    group["lr"] = held = torch.tensor(0.5, dtype=torch.float64)
    session = make_session(contract)
    session.load_from(model, optimizer)
    assert session.hyper["lr"] == (0.5,)
    session.step(*example_batch(), lr=0.25)
    session.load_into(model, optimizer)
    assert group["lr"] is held
    assert float(held) == 0.25


def test_the_base_optimizer_alone_has_no_rho() -> None:
    contract, _ = KINDS["sgd"]
    model = Toy()
    base = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.9)
    session = make_session(contract, state=whole_state(contract, 1))
    session.load_from(model, base)
    assert session.hyper == {"lr": (0.4,), "rho": (0.05,)}
    session.load_into(model, base)
    assert "rho" not in base.param_groups[0]
    assert set(base.state[model.bias]) == {"momentum_buffer"}


def test_tied_frozen_and_oddly_laid_out_parameters() -> None:
    class Odd(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.weight
            self.frozen = nn.Parameter(torch.zeros(2, 5).t(), requires_grad=False)

    contract, make = KINDS["sgd"]
    frozen = TensorSpec("frozen", "parameter", "float32", (5, 2))
    contract = replace(contract, state=(*contract.state, frozen), programs=())
    model = Odd()
    optimizer = make(model)
    session = make_session(contract, state=whole_state(contract, 4))
    session.load_into(model, optimizer)
    assert model.again is model.weight
    assert not model.frozen.requires_grad
    assert model.frozen.stride() == (1, 5)
    np.testing.assert_array_equal(model.frozen.numpy(), session.state["frozen"])
    other = make_session(contract)
    other.load_from(model, optimizer)
    assert session_bits(other) == session_bits(session)


def test_a_slot_that_is_a_python_number_stays_one() -> None:
    contract, make = KINDS["adamw"]
    model = Toy()
    optimizer = make(model)
    train(model, optimizer, 2)
    optimizer.state[model.bias]["step"] = 2
    session = make_session(contract)
    session.load_from(model, optimizer)
    assert session.state["slot.step.bias"] == 2.0
    session.set_state({**session.state, "slot.step.bias": np.array(5.0)})
    session.load_into(model, optimizer)
    assert type(optimizer.state[model.bias]["step"]) is int
    assert optimizer.state[model.bias]["step"] == 5


# -- refusals -------------------------------------------------------------------------------------


def _wider() -> nn.Module:
    model = Toy()
    model.weight = nn.Parameter(torch.zeros(1, 4))
    return model


def _renamed() -> nn.Module:
    model = Toy()
    model.gain = model.bias
    del model.bias
    return model


def _more() -> nn.Module:
    model = Toy()
    model.extra = nn.Parameter(torch.zeros(1))
    return model


def _one_group(model: nn.Module) -> sx.SAM:
    return sgd(model, params=[model.get_parameter("weight")])


def _two_groups(model: nn.Module) -> sx.SAM:
    return sgd(model, params=[{"params": [p]} for p in model.parameters()])


def _of_another_model(model: nn.Module) -> sx.SAM:
    del model
    return sgd(Toy())


def _other_slot(model: nn.Module) -> sx.SAM:
    optimizer = sgd(model)
    optimizer.state[model.get_parameter("bias")]["exp_avg"] = torch.zeros(1)
    return optimizer


def _wrong_slot(value: Any) -> Callable[[nn.Module], sx.SAM]:
    def make(model: nn.Module) -> sx.SAM:
        optimizer = sgd(model)
        optimizer.state[model.get_parameter("bias")]["momentum_buffer"] = value
        return optimizer

    return make


def _without_lr(model: nn.Module) -> sx.SAM:
    optimizer = sgd(model)
    del optimizer.param_groups[0]["lr"]
    return optimizer


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], str]] = {
    "shape": (_wider, sgd, r"Toy does not.*: weight: float32\[1, 4\], expected float32\[1, 3\]"),
    "name": (_renamed, sgd, "Toy does not belong.*: bias: missing; gain: not a tensor of this"),
    "more": (_more, sgd, "extra: not a tensor of this step"),
    "dtype": (lambda: Toy().double(), sgd, r"weight: float64\[1, 3\], expected float32\[1, 3\]"),
    "other optimizer": (Toy, adamw, "AdamW does not belong to this step: .* made with SGD"),
    "groups": (Toy, _one_group, r"SGD .* groups hold \[1\] of the trained .*, the step's \[2\]"),
    "group count": (Toy, _two_groups, r"groups hold \[1, 1\] of the trained"),
    "other model": (Toy, _of_another_model, r"groups hold \[0\] of .* make it from this model"),
    "other slot": (Toy, _other_slot, r"slot\.exp_avg\.bias: not a tensor of this step"),
    "slot shape": (Toy, _wrong_slot(torch.zeros(2)), r"momentum_buffer\.bias: float32\[2\], exp"),
    "slot dtype": (Toy, _wrong_slot(torch.zeros(1).double()), r"bias: float64\[1\], expected"),
    "slot number": (Toy, _wrong_slot(0.5), r"momentum_buffer\.bias: float32\[\], expected"),
    "no lr": (Toy, _without_lr, "a parameter group has no 'lr'"),
}


@pytest.mark.parametrize("direction", ["load_into", "load_from"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_is_refused_and_nothing_changes(case: str, direction: str) -> None:
    make_model, make_optimizer, message = REFUSED[case]
    model = make_model()
    optimizer = make_optimizer(model)
    contract = KINDS["sgd"][0]
    session = make_session(contract, state=whole_state(contract, 7))
    before = copy.deepcopy(eager_bits(model, optimizer)), session_bits(session)
    with pytest.raises(SessionError, match=message + ".*Nothing changed"):
        getattr(session, direction)(model, optimizer)
    assert (eager_bits(model, optimizer), session_bits(session)) == before


def test_a_hyper_parameter_that_is_not_finite_is_not_taken_over() -> None:
    contract, make = KINDS["sgd"]
    model = Toy()
    optimizer = make(model)
    optimizer.param_groups[0]["lr"] = float("nan")
    session = make_session(contract)
    before = session_bits(session)
    with pytest.raises(SessionError, match="not finite"):
        session.load_from(model, optimizer)
    assert session_bits(session) == before
