"""`check_parity` and its report: what goes in, what stays untouched, what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export.parity.oracle import Oracle
from tests.parity.cases import HYPER, RHO, batches_for, step_of
from tests.parity.loops import PlainLoop, Result


class EagerSession:
    """`TrainStep`, the package's own eager step, with the face of a session."""

    provider = "eager"

    def __init__(self, step: sx.TrainStep, draws: bool = False) -> None:
        import copy

        self.step_module = copy.deepcopy(step)
        self.oracle = Oracle(nn.Linear(1, 1), None, torch.optim.SGD([torch.ones(1)], lr=1.0))
        # Only for reading and writing state by name.
        self.oracle.model = self.step_module.model
        self.oracle.optimizer = self.step_module.optimizer.base_optimizer
        self.oracle.is_counting = draws

    @property
    def state(self) -> dict[str, np.ndarray]:
        self.oracle.seed = self.step_module.seed
        self.oracle.step_count = self.step_module.step_count
        return self.oracle.snapshot()

    def set_state(self, state: Any) -> None:
        self.oracle.load(state)
        self.step_module.seed = self.oracle.seed
        self.step_module.step_count = self.oracle.step_count

    def step(self, *batch: Any) -> Any:
        return self.step_module(*batch)


def loop(step: sx.TrainStep, **options: Any) -> PlainLoop:
    return PlainLoop(step.model, RHO, **HYPER, **options)


def test_the_given_things_are_left_as_they_were() -> None:
    step = step_of("conv", "float32")
    batches = batches_for("conv", "float32")
    step(*batches[0])
    session = loop(step)
    for value in session.slots.values():
        value.fill_(0.25)
    before = {k: v.clone() for k, v in step.model.state_dict().items()}
    slots = [dict(v) for v in step.optimizer.state.values()]
    kept = session.state
    generator = torch.get_rng_state()
    report = sx.check_parity(step, batches, sessions={"x": session}, num_steps=3)
    assert report.ok, str(report)
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in step.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for now, then in zip(step.optimizer.state.values(), slots, strict=True):
        for key, value in then.items():
            assert now[key] is value
    for name, value in session.state.items():
        np.testing.assert_array_equal(value, kept[name])


@pytest.mark.parametrize("optimizer", ["AdamW", "Adam", "RMSprop", "NAdam"])
def test_the_packages_own_eager_step_passes(optimizer: str) -> None:
    step = step_of("conv", "float32", optimizer=optimizer)
    batches = batches_for("conv", "float32")
    report = sx.check_parity(step, batches, sessions={"e": EagerSession(step)}, num_steps=6)
    assert report.ok, str(report)
    assert report.optimizer == optimizer
    assert report.targets[0].provider == "eager"


@pytest.mark.parametrize(
    "semantics",
    [
        {"running_stats": "both"},
        {"decay_in_ascent": True},
        {"randomness": "fresh", "running_stats": "both", "on_nonfinite": "ignore"},
    ],
)
def test_semantics_are_those_of_the_step(semantics: dict[str, Any]) -> None:
    step = step_of("conv", "float64", **semantics)
    batches = batches_for("conv", "float64")
    right = EagerSession(step)
    wrong = EagerSession(step_of("conv", "float64"))
    report = sx.check_parity(step, batches, sessions={"right": right, "wrong": wrong}, num_steps=3)
    assert [target.ok for target in report.targets] == [True, False], str(report)


def test_a_batch_that_is_not_finite_must_change_nothing() -> None:
    step = step_of("conv", "float32")
    batches = batches_for("conv", "float32")
    bad = batches[1][0].clone()
    bad[0, 0, 0, 0] = float("nan")
    batches[1] = (bad, batches[1][1])

    class Applies(PlainLoop):
        """Counts the running statistics of a step that it should skip."""

        def step(self, x: Any, y: Any) -> Result:
            result = super().step(x, y)
            if not result.finite:
                self.model.bn1.num_batches_tracked.add_(1)  # type: ignore[operator, union-attr]
            return result

    class Silent(PlainLoop):
        """Skips, and says that all is well."""

        def step(self, x: Any, y: Any) -> Result:
            result = super().step(x, y)
            result.finite = True
            return result

    sessions = {
        "right": loop(step),
        "applies": Applies(step.model, RHO, **HYPER),
        "silent": Silent(step.model, RHO, **HYPER),
    }
    report = sx.check_parity(step, batches, sessions=sessions, num_steps=4)
    right, applies, silent = report.targets
    assert right.ok, str(report)
    assert {row.name for row in applies.failed} == {"bn1.num_batches_tracked"}
    assert {row.name for row in silent.failed} >= {"finite"}


def test_on_nonfinite_raise_wants_an_error() -> None:
    step = step_of("mlp", "float32", on_nonfinite="raise")
    batches = batches_for("mlp", "float32")
    batches[1] = (batches[1][0] * float("nan"), batches[1][1])
    sessions = {"raises": EagerSession(step), "quiet": loop(step)}
    raises, quiet = sx.check_parity(step, batches, sessions=sessions, num_steps=3).targets
    assert raises.ok, raises.failed
    assert quiet.error is not None
    assert "no error came" in quiet.error


def test_ignored_nans_cannot_be_compared() -> None:
    step = step_of("mlp", "float32", on_nonfinite="ignore")
    batches = batches_for("mlp", "float32")
    batches[1] = (batches[1][0] * float("nan"), batches[1][1])
    with pytest.raises(sx.ParityError, match="Step 2 is not finite in eager"):
        sx.check_parity(step, batches, sessions={"x": loop(step)}, num_steps=3)


class Dropping(nn.Module):
    """Dropout between two layers; takes its input by keyword too."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.b = nn.Linear(8, 2)
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return self.b(nn.functional.dropout(self.a(x) * gain, 0.5, self.training))


def dropping(randomness: str, generator: str = "philox") -> sx.TrainStep:
    torch.manual_seed(0)
    model = Dropping()
    sam = sx.SAM(model.parameters(), torch.optim.Adam, rho=0.05, lr=1e-2)
    semantics = sx.Semantics(randomness=randomness, generator=generator)  # type: ignore[arg-type]
    return sx.TrainStep(model, nn.MSELoss(), sam, semantics=semantics, seed=5)


@pytest.mark.parametrize("generator", ["philox", "torch"])
def test_random_models_and_dict_batches(generator: str) -> None:
    step = dropping("same", generator)
    own = generator == "philox"
    values = torch.Generator().manual_seed(0)
    batches = [
        {
            "gain": torch.rand(size, 1, generator=values),
            "x": torch.randn(size, 4, generator=values),
            "wanted": torch.randn(size, 2, generator=values),
        }
        for size in (8, 5)
    ]
    sessions = {
        "same": EagerSession(step, own),
        "fresh": EagerSession(dropping("fresh", generator), own),
    }
    report = sx.check_parity(step, batches, sessions=sessions, num_steps=5)
    assert [target.ok for target in report.targets] == [True, False], str(report)
    # Torch's generator draws others in float64, so float64 cannot judge there.
    assert own != any("draws random numbers" in note for note in report.notes)
    assert any("noise floor without permutations" in note for note in report.notes)


def test_a_model_that_cannot_be_double_is_judged_in_its_own_dtype() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) @ torch.ones(5, 5, dtype=torch.float32)

    torch.manual_seed(0)
    model = Single()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=RHO, **HYPER)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam)
    sessions = {"good": loop(step), "bad": loop(step, fault="no perturbation")}
    report = sx.check_parity(step, batches_for("mlp", "float32"), sessions=sessions, num_steps=3)
    assert [target.ok for target in report.targets] == [True, False], str(report)
    assert any("judged by eager in float32: in float64 the model fails" in n for n in report.notes)


def test_a_session_that_fails_is_a_failed_target_and_the_others_go_on() -> None:
    step = step_of("mlp", "float32")

    class Breaks(PlainLoop):
        def step(self, x: Any, y: Any) -> Result:
            if self.count == 2:
                raise RuntimeError("kaboom")
            return super().step(x, y)

    class Deaf(PlainLoop):
        def set_state(self, state: Any) -> None:
            pass

    sessions = {
        "breaks": Breaks(step.model, RHO, **HYPER),
        "good": loop(step),
        "elsewhere": Deaf(step_of("mlp", "float32", seed=9).model, RHO, **HYPER),
    }
    batches = batches_for("mlp", "float32")
    report = sx.check_parity(step, batches, sessions=sessions, num_steps=4)
    breaks, good, elsewhere = report.targets
    assert not report.ok
    assert good.ok
    assert breaks.error == "free-running step 3: RuntimeError: kaboom"
    assert "kaboom" in str(report)
    assert {row.mode for row in elsewhere.failed} >= {"start"}


def test_noise_is_named() -> None:
    step = step_of("conv", "float64", optimizer="Adam")
    for group in step.optimizer.param_groups:
        group["weight_decay"] = 0.0
    batches = batches_for("conv", "float64")
    report = sx.check_parity(step, batches, sessions={"e": EagerSession(step)}, num_steps=4)
    (target,) = report.targets
    assert target.ok, str(report)
    assert "conv1.bias" in target.noise, "its true gradient is zero: BatchNorm follows"
    assert "conv1.weight" not in target.noise
    assert "noise: conv1.bias" in str(report)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batches": []}, "no batch"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"sessions": {}, "targets": []}, "no target, session or artifact"),
        ({"batches": [torch.ones(3, 12)]}, "Batch 0 is a Tensor"),
        ({"batches": [(torch.ones(3, 7), torch.zeros(3, dtype=torch.int64))]}, "Eager itself"),
        ({"targets": ["onnx", "onnx"]}, "Given twice: onnx"),
    ],
)
def test_what_cannot_be_compared_is_an_error(change: dict[str, Any], says: str) -> None:
    step = step_of("mlp", "float32")
    wanted: dict[str, Any] = {
        "batches": batches_for("mlp", "float32"),
        "sessions": {"x": loop(step)},
        "num_steps": 2,
    }
    with pytest.raises(sx.ParityError, match=says):
        sx.check_parity(step, **{**wanted, **change})


def test_the_report_is_a_table_and_json(tmp_path: Path) -> None:
    step = step_of("conv", "float32")
    sessions = {"good": loop(step), "nan": loop(step, fault="nan")}
    report = sx.check_parity(
        step, batches_for("conv", "float32"), sessions=sessions, num_steps=4, seed=3
    )
    text = str(report)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert len(text.splitlines()) <= 40
    assert text.startswith("parity with eager SAM + SGD: FAILED")
    assert "good: OK" in text
    assert "fc.bias: not finite in the target" in text
    report.to_json(tmp_path / "parity.json")
    assert [p.name for p in tmp_path.iterdir()] == ["parity.json"]
    values = json.loads((tmp_path / "parity.json").read_text())
    assert values == json.loads(json.dumps(report.to_dict()))
    assert values["format"] == 2
    assert values["ok"] is False
    assert values["seed"] == 3
    assert values["batch_sizes"] == [16, 16, 7, 16]
    assert values["semantics"]["running_stats"] == "ascent"
    assert values["versions"]["torch"] == torch.__version__
    assert values["tolerances"]["exact"] == 1e-9
    good, bad = values["targets"]
    assert good["ok"]
    assert not bad["ok"]
    assert len(good["lock_step"]) == len(good["free_running"]) == 4
    assert 0 < max(good["lock_step"]) < 1e-4
    rows = {(row["name"], row["mode"]): row for row in good["rows"]}
    assert rows["fc.weight", "lock-step"]["role"] == "parameter"
    assert rows["bn1.running_mean", "lock-step"]["role"] == "buffer"
    assert rows["slot.momentum_buffer.fc.weight", "free-running"]["role"] == "slot"
    assert rows["loss", "lock-step"]["role"] == "metric"
    assert any(row["error"] is None for row in bad["rows"]), "infinite is null"
    with pytest.raises(sx.ParityError, match="cannot be written"):
        report.to_json(tmp_path / "no" / "where.json")


def test_progress_is_told() -> None:
    step = step_of("mlp", "float32")
    told: list[tuple[str, int, int]] = []
    sx.check_parity(
        step,
        batches_for("mlp", "float32"),
        sessions={"x": loop(step)},
        num_steps=2,
        progress=lambda *what: told.append(what),
    )
    assert told == [
        ("x: free-running", 1, 2),
        ("x: free-running", 2, 2),
        ("x: lock-step", 1, 2),
        ("x: lock-step", 2, 2),
    ]


def test_targets_are_built_loaded_and_compared() -> None:
    pytest.importorskip("onnxruntime")
    step = step_of("conv", "float32")
    report = sx.check_parity(
        step, batches_for("conv", "float32"), targets=["onnx", "no-such-target"], num_steps=4
    )
    onnx, unknown = report.targets
    assert onnx.ok, str(report)
    assert onnx.provider == "CPUExecutionProvider"
    assert not unknown.ok
    assert unknown.error is not None
    assert "no-such-target" in unknown.error


def test_sizes_that_are_not_dynamic_are_fixed_in_the_target() -> None:
    step, batches = step_of("mlp", "float32"), batches_for("mlp", "float32", sizes=(5, 4))
    report = sx.check_parity(step, batches, targets=["onnx"], num_steps=2, dynamic=None)
    assert not report.ok
    assert "5" in str(report.targets[0].error)


def test_dynamic_sizes_of_inputs_that_there_are_not_are_refused() -> None:
    step, batches = step_of("mlp", "float32"), batches_for("mlp", "float32", sizes=(5,))
    with pytest.raises(sx.StepConfigError, match="dynamic names tokens; the batch has x, target"):
        sx.check_parity(step, batches, targets=["onnx"], num_steps=1, dynamic={"tokens": {0: "n"}})
