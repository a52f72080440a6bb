"""The average of the weights: eager and captured, against plain loops and torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sam_export as sx

DECAY = 0.8


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(10, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (10,), generator=generator),
        )
        for _ in range(count)
    ]


def train_step(**options: Any) -> sx.TrainStep:
    own = model()
    sam = sx.SAM(own.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    return sx.TrainStep(own, nn.CrossEntropyLoss(), sam, **options)


def by_torch(use_buffers: bool) -> AveragedModel:
    """What torch's own average is after the same steps; it starts at the first weights, too."""
    step = train_step()
    averaged = AveragedModel(
        step.model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=use_buffers
    )
    averaged.n_averaged.fill_(1)  # else it starts at those after the first step
    for x, y in batches():
        step(x, y)
        averaged.update_parameters(step.model)
    return averaged


def assert_same(found: nn.Module, wanted: nn.Module) -> None:
    state = found.state_dict()
    for name, value in wanted.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-13)


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_it_is_that_of_torch(buffers: Any) -> None:
    step = train_step(ema=sx.EMA(DECAY, buffers))
    for x, y in batches():
        step(x, y)
    found = copy.deepcopy(step.model)
    step.load_averages(found)
    assert_same(found, by_torch(use_buffers=buffers == "average").module)


@pytest.mark.parametrize("target", ["onnx", "torchscript"])
def test_a_session_evaluates_the_average(target: str) -> None:
    step = train_step(ema=sx.EMA(DECAY))
    session = sx.load(sx.capture(step, batches()[0]), target=target)
    for x, y in batches():
        session.step(x, y)
    average = by_torch(use_buffers=True).module.eval()
    x, y = batches(1)[0]
    with torch.no_grad():
        outputs = average(x)
    found = torch.tensor(session.evaluate(x, average=True))
    torch.testing.assert_close(found, outputs, rtol=0, atol=1e-12)
    loss = float(nn.functional.cross_entropy(outputs, y))
    assert session.evaluate_loss(x, y, average=True) == pytest.approx(loss, abs=1e-12)
    assert abs(session.evaluate_loss(x, y) - loss) > 1e-4


def test_training_does_not_see_it() -> None:
    one, other = train_step(ema=sx.EMA(DECAY)), train_step()
    for x, y in batches():
        one(x, y)
        other(x, y)
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_its_limits_are_the_weights_now_and_at_first(decay: float) -> None:
    step = train_step(ema=sx.EMA(decay))
    first = copy.deepcopy(step.model)
    for x, y in batches():
        step(x, y)
    averaged = copy.deepcopy(step.model)
    step.load_averages(averaged)
    assert_same(averaged, step.model if decay == 0.0 else first)


def test_a_step_that_is_not_finite_leaves_it() -> None:
    step = train_step(ema=sx.EMA(DECAY))
    session = sx.load(sx.capture(step, batches()[0]), target="torchscript")
    x, y = batches()[1]
    x = x.clone()
    x[0, 0] = torch.inf
    before, state = {n: v.clone() for n, v in step.averages.items()}, session.state
    assert not bool(step(x, y).finite)
    assert not bool(session.step(x, y).finite)
    assert all(torch.equal(step.averages[name], value) for name, value in before.items())
    assert all((session.state[name] == value).all() for name, value in state.items())


def test_it_goes_both_ways_and_through_checkpoints(tmp_path: Any) -> None:
    given = batches()
    step = train_step(ema=sx.EMA(DECAY))
    captured = sx.capture(step, given[0])
    first = sx.load(captured, target="torchscript")
    for x, y in given[:2]:
        step(x, y)
    first.load_from(step)
    for x, y in given[2:4]:
        first.step(x, y)
    first.save(tmp_path / "run.ckpt")
    second = sx.load(captured, target="onnx")
    second.restore(tmp_path / "run.ckpt")
    second.step(*given[4])
    second.load_into(step)
    step(*given[5])
    averaged = copy.deepcopy(step.model)
    step.load_averages(averaged)
    assert_same(averaged, by_torch(use_buffers=True).module)


def test_a_step_with_another_average_is_refused() -> None:
    session = sx.load(sx.capture(train_step(ema=sx.EMA(DECAY)), batches()[0]), target="torchscript")
    for other in (train_step(), train_step(ema=sx.EMA(0.5))):
        with pytest.raises(sx.SessionError, match=r"this step EMA\(decay=0.8"):
            session.load_from(other)
        with pytest.raises(sx.SessionError, match="To leave the average out"):
            session.load_into(other)


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")
def test_the_averaged_model_is_written(tmp_path: Any) -> None:
    given = batches()
    session = sx.load(sx.capture(train_step(ema=sx.EMA(DECAY)), given[0]), target="torchscript")
    for x, y in given:
        session.step(x, y)
    session.export_model(tmp_path / "model.pt", average=True)
    x = given[0][0]
    with torch.no_grad():
        wanted = by_torch(use_buffers=True).module.eval()(x)
        found = torch.jit.load(tmp_path / "model.pt")(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_a_state_dict_carries_it() -> None:
    given = batches()
    step = train_step(ema=sx.EMA(DECAY))
    for x, y in given[:3]:
        step(x, y)
    other = train_step(ema=sx.EMA(DECAY))
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    for x, y in given[3:]:
        other(x, y)
    averaged = copy.deepcopy(other.model)
    other.load_averages(averaged)
    assert_same(averaged, by_torch(use_buffers=True).module)


def test_what_is_no_average_is_refused() -> None:
    with pytest.raises(sx.StepConfigError, match=r"EMA\(decay=1.5\): .* from 0 to 1"):
        sx.EMA(1.5)
    with pytest.raises(sx.StepConfigError, match="expected 'average' or 'copy'"):
        sx.EMA(buffers="none")  # type: ignore[arg-type]
    with pytest.raises(sx.StepConfigError, match="ema=0.9: expected EMA"):
        train_step(ema=0.9)


def test_without_one_there_is_none_to_evaluate() -> None:
    session = sx.load(sx.capture(train_step(), batches()[0]), target="torchscript")
    with pytest.raises(sx.SessionError, match="No program 'evaluate_average'"):
        session.evaluate(batches()[0][0], average=True)


def test_the_stock_training_api_refuses_it() -> None:
    own = model().float()
    sam = sx.SAM(own.parameters(), torch.optim.SGD, lr=0.1)
    step = sx.TrainStep(own, nn.CrossEntropyLoss(), sam, ema=sx.EMA())
    x, y = batches()[0]
    with pytest.raises(sx.LoweringError, match="no place for an average"):
        sx.load(sx.capture(step, (x.float(), y)), target="ort-artifacts")
