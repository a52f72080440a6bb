"""The files of ``ort-artifacts`` under onnxruntime-training's own classes, with none of our code.

The oracle is a plain eager loop over a stock optimizer, in ``ort_stock``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sam_export as sx
from sam_export.artifact.folder import open_artifact
from sam_export.artifact.ort_checkpoint import OrtCheckpoint
from tests.runtime.ort_stock import (
    BATCHES,
    OPTIMIZERS,
    RHO,
    Artifacts,
    Net,
    assert_equal_to_eager,
    eager,
    exported,
    made,
    opened,
    train,
)
from tests.runtime.target_cases import images

api: Any = pytest.importorskip(
    "onnxruntime.training.api", reason="needs a training build of ONNX Runtime"
)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_stock_classes_train_with_sam(name: str, artifacts: Artifacts, tmp_path: Path) -> None:
    step = made(name)
    kind, options, update, operator = OPTIMIZERS[name]
    folder = artifacts(name)
    artifact = open_artifact(folder)
    layout = artifact.details["layout"]
    assert (layout["update"], layout["optimizer"]) == (update, operator)
    assert bool(artifact.details["update_in_training_model_because"]) == (update != "gradient")
    names = {p.name for p in folder.iterdir()}
    assert {"training_model.onnx", "eval_model.onnx", "optimizer_model.onnx", "checkpoint"} < names

    model = copy.deepcopy(step.model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stock = opened(folder)
    assert stock[1].input_names() == ["x", "target"]
    found = train(stock, BATCHES, options["lr"])
    wanted = eager(model, kind(model.parameters(), **options), BATCHES)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert_equal_to_eager(stock[0], model, before)

    x, y = images(7, torch.float32)
    model.eval()
    stock[1].eval()
    loss, outputs = stock[1](x.numpy(), y.numpy())
    np.testing.assert_allclose(outputs, model(x).detach(), atol=1e-5)
    assert float(loss) == pytest.approx(
        float(nn.functional.cross_entropy(model(x).detach(), y)), rel=1e-5
    )
    stock[1].export_model_for_inferencing(tmp_path / "inference.onnx", ["output"])
    import onnxruntime

    inference = onnxruntime.InferenceSession(tmp_path / "inference.onnx")
    (alone,) = inference.run(None, {"x": x.numpy()})
    np.testing.assert_array_equal(alone, outputs)


def test_two_parameter_groups_are_updated_inside_the_training_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    head = list(model.head.parameters())
    rest = [*model.conv.parameters(), *model.norm.parameters()]
    groups = [{"params": rest, "lr": 0.1}, {"params": head, "lr": 0.02, "weight_decay": 0.1}]
    sam = sx.SAM(groups, torch.optim.SGD, rho=RHO, momentum=0.9)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam)
    artifact = exported(step, tmp_path / "step")
    assert artifact.details["layout"]["update"] == "parameters"
    assert "2 parameter groups" in artifact.details["update_in_training_model_because"]

    other = copy.deepcopy(model)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    rest = [*other.conv.parameters(), *other.norm.parameters()]
    base = torch.optim.SGD(
        [
            {"params": rest, "lr": 0.1},
            {"params": list(other.head.parameters()), "lr": 0.02, "weight_decay": 0.1},
        ],
        momentum=0.9,
    )
    stock = opened(tmp_path / "step")
    train(stock, BATCHES, lr=123.0)  # the stock learning rate multiplies gradients of zero
    eager(other, base, BATCHES)
    assert_equal_to_eager(stock[0], other, before)
    stock[0].parameters["hyper.lr"] = np.array([0.0, 0.0])
    frozen = stock[0].parameters["head.weight"].data.copy()
    train(stock, BATCHES[:1], lr=123.0)
    np.testing.assert_array_equal(stock[0].parameters["head.weight"].data, frozen)


def test_rho_is_read_from_the_checkpoint_at_every_step(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    folder, step = artifacts("sgd"), made("sgd")
    model = copy.deepcopy(step.model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    stock = opened(folder)
    for index, batch in enumerate(BATCHES[:6]):
        rho = 0.3 / (index + 1)
        stock[0].parameters["hyper.rho"] = np.array([rho])
        train(stock, [batch], lr=0.1)
        eager(model, base, [batch], rho)
    assert_equal_to_eager(stock[0], model, before)


def test_a_stock_schedule_sets_the_learning_rate(artifacts: Artifacts, tmp_path: Path) -> None:
    folder, step = artifacts("momentum"), made("momentum")
    model = copy.deepcopy(step.model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    base = torch.optim.SGD(model.parameters(), **OPTIMIZERS["momentum"][1])
    _, module, optimizer = stock = opened(folder)
    schedule = api.LinearLRScheduler(optimizer, warmup_step_count=2, total_step_count=6,
                                     initial_lr=0.1)  # fmt: skip
    for batch in BATCHES[:5]:
        base.param_groups[0]["lr"] = optimizer.get_learning_rate()
        module(*(value.numpy() for value in batch))
        optimizer.step()
        module.lazy_reset_grad()
        schedule.step()
        eager(model, base, [batch])
    assert_equal_to_eager(stock[0], model, before)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_gradients_of_micro_batches_add_up(name: str, artifacts: Artifacts, tmp_path: Path) -> None:
    """Each with a perturbation of its own (m-sharpness), as the API adds up any gradient."""
    folder, step = artifacts(name), made(name)
    model = copy.deepcopy(step.model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kind, options, *_ = OPTIMIZERS[name]
    base = kind(model.parameters(), **options)
    state, module, optimizer = opened(folder)
    optimizer.set_learning_rate(options["lr"])
    for first in (0, 2, 4):
        total = [torch.zeros_like(p) for p in model.parameters()]
        for x, y in BATCHES[first : first + 2]:
            module(x.numpy(), y.numpy())
            nothing = torch.optim.SGD(model.parameters(), lr=0.0)
            eager(model, nothing, [(x, y)])  # leaves g_adv in .grad
            for sum_, p in zip(total, model.parameters(), strict=True):
                assert p.grad is not None
                sum_ += p.grad
        for sum_, p in zip(total, model.parameters(), strict=True):
            p.grad = sum_
        found = {key: parameter.grad for key, parameter in state.parameters if
                 parameter.requires_grad}  # fmt: skip
        for key, p in model.named_parameters():
            assert p.grad is not None
            np.testing.assert_allclose(found[key], p.grad.numpy(), rtol=1e-4, atol=1e-6)
        base.step()
        optimizer.step()
        module.lazy_reset_grad()
    assert_equal_to_eager(state, model, before)


@pytest.mark.parametrize("name", ["sgd", "adamw", "momentum"])
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(
    name: str, artifacts: Artifacts, tmp_path: Path
) -> None:
    folder = artifacts(name)
    lr = OPTIMIZERS[name][1]["lr"]
    first = opened(folder)
    train(first, BATCHES[:5], lr)
    api.CheckpointState.save_checkpoint(first[0], tmp_path / "later", include_optimizer_state=True)
    second = opened(folder, tmp_path / "later")
    assert train(first, BATCHES[5:10], lr) == train(second, BATCHES[5:10], lr)
    for key, parameter in first[0].parameters:
        np.testing.assert_array_equal(parameter.data, second[0].parameters[key].data, err_msg=key)


@pytest.mark.parametrize("name", ["sgd", "adamw", "momentum"])
def test_a_step_that_is_not_finite_changes_nothing(
    name: str, artifacts: Artifacts, tmp_path: Path
) -> None:
    folder = artifacts(name)
    state, module, optimizer = stock = opened(folder)
    lr = OPTIMIZERS[name][1]["lr"]
    train(stock, BATCHES[:2], lr)

    def saved() -> OrtCheckpoint:
        api.CheckpointState.save_checkpoint(state, tmp_path / "now", include_optimizer_state=True)
        return OrtCheckpoint.from_bytes((tmp_path / "now").read_bytes())

    before = saved()
    x, y = images(6, torch.float32)
    x[1, 0, 2, 2] = float("inf")
    assert not bool(module(x.numpy(), y.numpy())[4])
    optimizer.step()
    module.lazy_reset_grad()
    after = saved()
    for part in ("trainable", "frozen"):
        for key, value in getattr(before, part).items():
            np.testing.assert_array_equal(getattr(after, part)[key], value, err_msg=key)
    assert before.optimizer is not None
    assert after.optimizer is not None
    assert after.optimizer.step == before.optimizer.step
    for key, moments in before.optimizer.moments.items():
        np.testing.assert_array_equal(after.optimizer.moments[key], moments)
    train(stock, BATCHES[2:3], lr)
    assert (saved().trainable["head.weight"] != before.trainable["head.weight"]).all()


def test_gradients_equal_those_of_onnx_runtimes_own_differentiation(tmp_path: Path) -> None:
    """A second source of gradients, which shares nothing with torch: `GradientGraphBuilder`."""
    import onnxruntime
    from onnxruntime.capi import _pybind_state as native

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 3),
    )  # fmt: skip
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.0, lr=0.1)
    artifact = exported(sx.TrainStep(model, nn.CrossEntropyLoss(), sam), tmp_path / "step")
    names = [name for name, _ in model.named_parameters()]
    x, y = (value.numpy() for value in images(6, torch.float32))

    # Without BatchNorm and dropout the loss in evaluation is the loss in training.
    forward = (tmp_path / "step" / "eval_model.onnx").read_bytes()
    builder = native.GradientGraphBuilder(
        forward, {"loss"}, set(names), "loss", native.SessionOptions()
    )
    builder.build()
    session = onnxruntime.InferenceSession(builder.get_model())
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
    wanted = {item.name for item in session.get_inputs()}
    feeds = {**weights, "input": x, "target": y, "hyper.rho": np.zeros(1)}
    feeds |= {name: np.ones((), np.float32) for name in wanted if name.endswith("_grad")}
    outputs = [f"{name}_grad" for name in names]
    theirs = session.run(outputs, {name: feeds[name] for name in wanted})

    state, module, _ = opened(artifact.path)
    module(x, y)
    for name, value in zip(names, theirs, strict=True):
        np.testing.assert_allclose(state.parameters[name].grad, value, rtol=1e-5, atol=1e-7)
