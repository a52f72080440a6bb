"""Options of the base optimizer as graph inputs, and the others as constants that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

import sam_export as sx
from sam_export.step.update import TensorScalars
from tests.tracing.test_base_optimizers import data, model_for, plain_step, state_of
from tests.tracing.test_capture import Runner, worst_change

CASES: list[tuple[type[optim.Optimizer], dict[str, Any], dict[str, list[float]]]] = [
    (
        optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        {"weight_decay": [0.0, 0.3, 0.1], "momentum": [0.5, 0.9, 0.1]},
    ),
    (optim.AdamW, {"lr": 0.01}, {"weight_decay": [0.0, 0.5, 0.1], "eps": [1e-8, 1e-2, 1e-4]}),
    (optim.Adam, {"lr": 0.01}, {"weight_decay": [0.0, 0.5, 0.1]}),
    (optim.RMSprop, {"lr": 0.01}, {"alpha": [0.9, 0.5, 0.99]}),
    (optim.Adadelta, {"lr": 1.0}, {"base_rho": [0.9, 0.5, 0.8]}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_options_change_from_step_to_step(case: Any) -> None:
    kind, options, changing = case
    model = model_for(kind)
    sam = sx.SAM(model.parameters(), kind, rho=0.05, **options)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam)
    captured = sx.capture(step, data(1)[0], dynamic_hyper=changing)
    assert [spec.name for spec in captured.contract.hyper] == ["lr", "rho", *changing]
    runner = Runner(captured)
    start = {name: value.clone() for name, value in runner.state.items()}
    base = kind(model.parameters(), **options)
    for index, (x, y) in enumerate(data(3)):
        now = {name: values[index] for name, values in changing.items()}
        runner.step((x, y), **{name: [value] for name, value in now.items()})
        for name, value in now.items():
            base.param_groups[0][{"base_rho": "rho"}.get(name, name)] = value
        plain_step(model, base, 0.05, x, y)
        assert worst_change(start, runner.state, state_of(model, base)) < 1e-11


def test_decay_that_is_ascended_changes_too() -> None:
    model = model_for(optim.SGD)
    sam = sx.SAM(model.parameters(), optim.SGD, rho=0.5, lr=0.1, weight_decay=0.01)
    semantics = sx.Semantics(decay_in_ascent=True)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam, semantics=semantics)
    batch = data(1)[0]
    runner = Runner(sx.capture(step, batch, dynamic_hyper=["weight_decay"]))
    found = runner.step(batch, weight_decay=[0.7])
    sam.param_groups[0]["weight_decay"] = 0.7
    result = step(*batch)
    for name in ("grad_norm", "perturbed_loss"):
        assert float(found[name]) == pytest.approx(float(getattr(result, name)), rel=1e-12)


def made(**options: Any) -> sx.TrainStep:
    model = model_for(optim.SGD)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **options}
    sam = sx.SAM(model.parameters(), optim.SGD, **options)
    return sx.TrainStep(model, nn.CrossEntropyLoss(), sam)


def test_what_is_no_input_is_listed_and_cannot_be_changed(tmp_path: Path) -> None:
    captured = sx.capture(made(), data(1)[0], dynamic_hyper=["weight_decay"])
    (baked,) = captured.contract.baked
    expected = {"momentum": 0.9, "dampening": 0, "nesterov": False, "maximize": False}
    assert baked == expected
    artifact = sx.export(captured, tmp_path / "artifact", target="onnx")
    assert artifact.contract.baked == captured.contract.baked
    session = sx.load(tmp_path / "artifact")
    session.step(*data(1)[0], weight_decay=0.5)
    assert session.hyper["weight_decay"] == (0.5,)
    before = session.state
    with pytest.raises(sx.SessionError, match="Unknown hyper-parameter 'momentum'"):
        session.step(*data(1)[0], momentum=0.5)
    with pytest.raises(sx.SessionError, match=r"momentum of group 0 is 0\.5 and in the graph 0\.9"):
        session.load_from(made(momentum=0.5))
    with pytest.raises(sx.SessionError, match="nesterov of group 0 is True"):
        session.load_into(made(nesterov=True))
    assert all((session.state[name] == value).all() for name, value in before.items())
    session.load_from(made(weight_decay=0.25))
    assert session.hyper["weight_decay"] == (0.25,)


@pytest.mark.parametrize("name", ["betas", "nesterov", "warmth"])
def test_what_is_no_number_is_refused(name: str) -> None:
    with pytest.raises(sx.StepConfigError, match=f"'{name}' is no number .* SGD .*lr, momentum"):
        sx.capture(made(), data(1)[0], dynamic_hyper=[name])


def test_only_the_question_whether_an_option_is_zero_has_an_answer() -> None:
    option, other = torch.tensor(0.0), torch.tensor(0.0)
    with TensorScalars([option]):
        assert (option != 0) is True
        assert (option > 0.0) is True
        assert (option == 0) is False
        assert (option <= 0) is False
        assert bool(option) is True
        for comparison in (option != 1, option > 0.5, option <= other, other != 0, other > 0):
            assert isinstance(comparison, torch.Tensor)
        assert bool(other) is False
