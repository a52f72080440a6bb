"""The scripted module: what it holds, what its methods do and refuse, what its source can say."""

from __future__ import annotations

import functools
import io
import math
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export.artifact.contract import METRICS
from sam_export.lower.torchscript import lower
from tests.step.test_sam import batches, small_model


@functools.cache
def captured_step(model: nn.Module | None = None, **semantics: Any) -> sx.CapturedStep:
    torch.manual_seed(0)
    model = small_model() if model is None else model
    sam = sx.SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=0.05)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam, semantics=sx.Semantics(**semantics))
    return sx.capture(step, batches(1)[0])


def load(data: bytes | Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, about itself
        return torch.jit.load(io.BytesIO(data) if isinstance(data, bytes) else str(data))


def module_of(captured: sx.CapturedStep) -> Any:
    return load(lower(captured).files["step"].data)


def save(module: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(module, buffer)
    return buffer.getvalue()


def state_of(module: Any) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items()}


# -- the module -----------------------------------------------------------------------------------


def test_all_programs_are_one_file(tmp_path: Path) -> None:
    artifact = sx.export(captured_step(), tmp_path / "step", target="torchscript")
    assert {artifact.file(name).name for name in artifact.files} == {"step.pt"}
    assert sorted(artifact.files) == ["evaluate", "evaluate_loss", "step"]


def test_the_module_holds_the_state_under_the_names_of_the_contract() -> None:
    captured = captured_step()
    module = module_of(captured)
    held = module.state_dict()
    names = [spec.name for spec in captured.contract.state]
    assert set(held) == {*names, "hyper.lr", "hyper.rho"}
    for spec in captured.contract.state:
        np.testing.assert_array_equal(held[spec.name].numpy(), captured.state[spec.name])
        assert str(held[spec.name].dtype) == f"torch.{spec.dtype}"
    parameters = {spec.name for spec in captured.contract.state if spec.role == "parameter"}
    assert set(dict(module.named_parameters())) == parameters
    assert not any(value.requires_grad for value in module.parameters())
    assert held["hyper.lr"].tolist() == [0.05]
    assert module.step_count == 0


def test_forward_is_a_step_in_place_and_returns_its_loss() -> None:
    captured = captured_step()
    module, other = module_of(captured), module_of(captured)
    before = state_of(module)
    for batch in batches(3):
        loss, results = module(*batch), other.step(*batch)
        assert not loss.requires_grad
        assert float(loss) == float(results["loss"])
        assert tuple(results) == METRICS
    assert module.step_count == other.step_count == 3
    assert state_of(module) == state_of(other)
    changed = {name for name, value in state_of(module).items() if value != before[name]}
    assert changed == {spec.name for spec in captured.contract.state}


def test_results_are_not_changed_by_later_steps() -> None:
    module = module_of(captured_step())
    first = module.step(*batches(1)[0])
    kept = {name: value.clone() for name, value in first.items()}
    for batch in batches(3):
        module(*batch)
    assert all(torch.equal(first[name], kept[name]) for name in first)


def test_set_hyper() -> None:
    module = module_of(captured_step())
    module.set_hyper("lr", 0.5)
    module.set_hyper("rho", [0.25])
    assert module.hyper.lr.tolist() == [0.5]
    module.set_hyper("lr", 1)
    assert module.hyper.lr.tolist() == [1.0]
    module.set_hyper("lr", 0.5)
    assert module.hyper.rho.tolist() == [0.25]
    for name, value, message in (
        ("momentum", 0.5, "there is no hyper-parameter momentum; there are lr, rho"),
        ("lr", [0.5, 0.5], "takes one number or 1, one per parameter group; got 2"),
        ("lr", -1.0, "lr cannot be -1"),
        ("rho", math.nan, "rho cannot be nan"),
    ):
        with pytest.raises(torch.jit.Error, match=message):
            module.set_hyper(name, value)
    assert module.hyper.lr.tolist() == [0.5]
    before = state_of(module)
    module.set_hyper("lr", 0.0)
    module(*batches(1)[0])
    after = state_of(module)
    assert after["0.weight"] == before["0.weight"]  # AdamW moves nothing at lr = 0
    assert after["slot.exp_avg.0.weight"] != before["slot.exp_avg.0.weight"]


def test_evaluate_changes_nothing_and_equals_the_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    module = module_of(captured_step(model))
    before = state_of(module)
    x, y = batches(1)[0]
    model.eval()
    torch.testing.assert_close(module.evaluate(x), model(x).detach())
    torch.testing.assert_close(
        module.evaluate_loss(x, y), nn.functional.cross_entropy(model(x), y).detach()
    )
    assert state_of(module) == before
    assert module.step_count == 0


def test_a_saved_module_goes_on_exactly() -> None:
    module = module_of(captured_step())
    data = batches(6)
    for batch in data[:3]:
        module(*batch)
    module.set_hyper("lr", 0.01)
    module(*data[3])
    again = load(save(module))
    for batch in data[4:]:
        assert float(module(*batch)) == float(again(*batch))
    assert again.step_count == 6
    assert state_of(again) == state_of(module)


def test_gradients_of_the_caller_stay_out_and_on() -> None:
    module = module_of(captured_step())
    x, y = batches(1)[0]
    assert torch.is_grad_enabled()
    loss = module(x.requires_grad_(), y)
    assert not loss.requires_grad
    assert torch.is_grad_enabled()


def test_nothing_of_python_is_in_the_file() -> None:
    """No path, no module of ours, nothing that has to be imported."""
    data = lower(captured_step()).files["step"].data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        code = b"".join(archive.read(name) for name in archive.namelist() if "/code/" in name)
    for word in (b"sam_export", b".py", b"/work", b"site-packages", b"ops.prim.PythonOp"):
        assert word not in code


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:, :4], y), r"batch tensor 'input' is float32\[6, 4\]; expected float32"),
        (lambda x, y: (x[0], y), r"batch tensor 'input' is float32\[5\]; expected"),
        (lambda x, y: (x.double(), y), r"batch tensor 'input' is float64\[6, 5\]; expected"),
        (lambda x, y: (x, y.float()), r"batch tensor 'target' is float32\[6\]; expected int64"),
        (lambda x, y: (x, y[:5]), "batch is 5 in batch tensor 'target', but 6 in another"),
        (lambda x, y: (x[:0], y[:0]), "batch is 0 in batch tensor 'input'; it must be at least 1"),
    ],
)
def test_a_batch_that_does_not_fit_changes_nothing(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], message: str
) -> None:
    module = module_of(captured_step())
    before = state_of(module)
    x, y = batches(1)[0]
    assert x.shape == (6, 5)
    for method in (module, module.step, module.evaluate_loss):
        with pytest.raises(torch.jit.Error, match=message):
            method(*change(x, y))
    assert state_of(module) == before
    assert module.step_count == 0


def test_a_step_that_is_not_finite() -> None:
    x, y = batches(1)[0]
    x = x * math.nan
    skipping = module_of(captured_step())
    before = state_of(skipping)
    results = skipping.step(x, y)
    assert not bool(results["finite"])
    assert state_of(skipping) == before
    assert skipping.step_count == 1  # as a session counts

    raising = module_of(captured_step(on_nonfinite="raise"))
    with pytest.raises(torch.jit.Error, match="the step is not finite .loss nan.*nothing was"):
        raising(x, y)
    assert state_of(raising) == before
    assert raising.step_count == 0
    raising(*batches(1)[0])
    assert raising.step_count == 1

    ignoring = module_of(captured_step(on_nonfinite="ignore"))
    assert math.isnan(float(ignoring(x, y)))
    assert torch.isnan(dict(ignoring.named_parameters())["0.weight"]).all()


@pytest.mark.parametrize("name", ["step", "slot", "hyper", "evaluate", "step_count"])
def test_a_name_that_the_module_needs_is_refused(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.get_submodule(name)(x)

    with pytest.raises(sx.LoweringError, match=f"'{name}.weight' would hide '{name}'"):
        lower(captured_step(Named()))


@pytest.mark.parametrize(
    ("name", "why"),
    [("in", "is a keyword"), ('a"b', "holds a"), ("a\\b", "holds a"), ("ö", "holds")],
)
def test_a_name_that_torchscript_cannot_read_back_is_refused(name: str, why: str) -> None:
    """It writes ``parts.in`` into the file, and does not parse that again."""
    model = nn.Sequential()
    model.add_module(name, nn.Linear(5, 3))
    with pytest.raises(sx.LoweringError, match=f"cannot read back: .* {why}"):
        lower(captured_step(model))


def test_a_file_that_is_no_module_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    from sam_export.artifact.folder import LoweredFile, write_artifact

    lowered = lower(captured_step())
    other = lower(captured_step(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))))
    files = dict.fromkeys(lowered.files, LoweredFile("step.pt", b"not a module"))
    write_artifact(replace(lowered, files=files), tmp_path / "bytes")
    with pytest.raises(sx.ArtifactError, match="cannot read"):
        sx.load(tmp_path / "bytes")
    write_artifact(replace(lowered, files=other.files), tmp_path / "other")
    with pytest.raises(sx.ArtifactError, match=r"'0.weight' is float32\[4, 5\], the contract says"):
        sx.load(tmp_path / "other")


def test_exporting_and_loading_warn_of_nothing(tmp_path: Path) -> None:
    captured = captured_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sx.export(captured, tmp_path / "step", target="torchscript")
        sx.load(tmp_path / "step").step(*batches(1)[0])
