"""A step in its three stages: ascent, descent, update, and what may stand between them."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export._compat import torchscript
from sam_export.errors import SessionError, StepConfigError
from tests.parity.cases import batches_for, step_of

TARGETS = ["onnx", "torchscript"]
"""Quick to build; the others have their turn in `test_the_stages_are_the_step`."""


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layers: dict[str, list[nn.Module]] = {
        "plain": [nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)],
        "norm": [nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)],
        "dropout": [nn.Linear(12, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3)],
    }
    return nn.Sequential(*layers[kind])


def step_over(
    kind: str,
    dtype: torch.dtype = torch.float64,
    optimizer: Mapping[str, Any] | None = None,
    semantics: Mapping[str, Any] | None = None,
    **others: Any,
) -> sx.TrainStep:
    model = model_of(kind).to(dtype)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, **(optimizer or {})}
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, **options)
    chosen = sx.Semantics(**(semantics or {}))
    return sx.TrainStep(model, nn.CrossEntropyLoss(), sam, semantics=chosen, seed=5, **others)


def batch_of(size: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(size, 12, generator=generator, dtype=torch.float64).to(dtype)
    return [x, torch.randint(3, (size,), generator=generator)]


_ROOT = tempfile.TemporaryDirectory(prefix="sam_export-staged-")


@functools.cache
def _folder(target: str, given: str) -> Path:
    """The artifact of `session_of`'s arguments, made once."""
    return Path(_ROOT.name, f"{target}-{hashlib.sha256(given.encode()).hexdigest()[:16]}")


def session_of(
    target: str, kind: str, dtype: torch.dtype = torch.float64, **options: Any
) -> sx.Session:
    """A new session of the step that `step_over` makes of these arguments."""
    folder = _folder(target, repr((kind, dtype, sorted(options.items()))))
    if not folder.exists():
        step = step_over(kind, dtype, **options)
        captured = sx.capture(step, batch_of(8, dtype), staged=True)
        sx.export(captured, folder, target)
    return sx.load(folder, threads=1)


def mean(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of gradients, as a pipeline computes it: in NumPy, on the host."""
    return {name: np.mean([np.asarray(part[name]) for part in parts], axis=0) for name in parts[0]}


def assert_equal_states(one: Mapping[str, Any], other: Mapping[str, Any], rel: float = 0) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        if rel == 0:
            np.testing.assert_array_equal(other[name], value, err_msg=name)
        else:
            np.testing.assert_allclose(other[name], value, rtol=rel, atol=1e-13, err_msg=name)


# -- with nothing in between they are the step ----------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "statistics of both passes": {"kind": "norm", "semantics": {"running_stats": "both"}},
    "the same draws": {"kind": "dropout"},
    "fresh draws": {"kind": "dropout", "semantics": {"randomness": "fresh"}},
    "clipping": {"kind": "plain", "semantics": {"clip_norm": 0.05, "clip_value": 0.02}},
    "decay in the ascent": {"kind": "plain", "semantics": {"decay_in_ascent": True}},
    "GSAM": {"kind": "norm", "optimizer": {"variant": sx.GSAM()}},
    "Friendly SAM": {"kind": "plain", "optimizer": {"variant": sx.FriendlySAM()}},
    "ASAM": {"kind": "plain", "optimizer": {"perturbation": sx.ASAM()}},
    "dampening": {"kind": "plain", "optimizer": {"dampening": 0.3}},
    "an average": {"kind": "norm", "ema": sx.EMA(0.8)},
    "parts": {"kind": "norm", "semantics": {"micro_batches": 2}},
    "raise": {"kind": "norm", "semantics": {"on_nonfinite": "raise"}},
    "ignore": {"kind": "norm", "semantics": {"on_nonfinite": "ignore"}},
}
CELLS = [(way, TARGETS[index % 2]) for index, way in enumerate(WAYS)]
CELLS += [("GSAM", "torch-compile"), ("statistics of both passes", "aot-inductor")]
CELLS += [("Friendly SAM", "onnx-training"), ("fresh draws", "onnx"), ("the same draws", "onnx")]


@pytest.mark.parametrize(("way", "target"), CELLS)
def test_the_stages_are_the_step(way: str, target: str) -> None:
    """In float64, every state tensor and every result, over batches of two sizes."""
    one, three = (session_of(target, **WAYS[way]) for _ in range(2))
    stages = sx.InStages(three)
    for index, size in enumerate((8, 8, 6, 8)):
        batch, lr = batch_of(size, seed=index), 0.1 / (1 + index)
        whole, found = one.step(*batch, lr=lr), stages.step(*batch, lr=lr)
        for name in ("loss", "perturbed_loss", "grad_norm", "perturbation_norm", "finite"):
            assert float(getattr(found, name)) == pytest.approx(
                float(getattr(whole, name)), rel=1e-12
            )
        assert (found.perturbed_grad_norm is None) == (whole.perturbed_grad_norm is None)
    assert one.step_count == three.step_count == 4
    assert_equal_states(one.state, three.state, rel=1e-10)


PROVEN = [("GSAM", "onnx"), ("Friendly SAM", "torchscript"), ("the same draws", "torchscript")]


@pytest.mark.parametrize(("way", "target"), [*PROVEN, ("statistics of both passes", "onnx")])
def test_against_plain_eager_loops(way: str, target: str) -> None:
    """By the parity check, whose oracle shares no code with the stages."""
    step = step_over(**WAYS[way])
    batches = [tuple(batch_of(size, seed=size)) for size in (8, 8, 6)]
    session = session_of(target, **WAYS[way])
    report = sx.check_parity(
        step, batches, sessions={"in stages": sx.InStages(session)}, num_steps=3
    )
    assert report.ok, str(report)


def test_the_check_of_an_artifact_takes_its_stages_too() -> None:
    """As a row of its own, in a process of its own, with a checkpoint in the middle."""
    session_of("onnx", **WAYS["GSAM"])  # makes the folder
    options = {name: value for name, value in WAYS["GSAM"].items() if name != "kind"}
    folder = _folder("onnx", repr(("norm", torch.float64, sorted(options.items()))))
    report = sx.check_parity(
        step_over(**WAYS["GSAM"]),
        [tuple(batch_of(size, seed=size)) for size in (8, 6)],
        artifacts={"deployed": folder},
        num_steps=2,
    )
    assert report.ok, str(report)
    assert [row.name for row in report.targets] == ["deployed", "deployed, in stages"]


def test_a_convolutional_net_in_float32() -> None:
    step = step_of("conv", "float32")
    batches = batches_for("conv", "float32")
    session = sx.load(sx.capture(step, batches[0], staged=True), target="onnx")
    report = sx.check_parity(step, batches, sessions={"s": sx.InStages(session)}, num_steps=3)
    assert report.ok, str(report)


@pytest.mark.parametrize("target", ["onnx", "torch-compile"])
def test_mixed_precision_with_a_scaled_loss(target: str) -> None:
    """float16 casts, gradients unscaled by each stage."""
    scaling = sx.LossScaling(init_scale=1024.0, growth_interval=2)
    precision = {"autocast": torch.float16, "loss_scaling": scaling}
    step = step_over("plain", torch.float32, **precision)
    batches = [tuple(batch_of(8, torch.float32, seed)) for seed in range(3)]
    session = session_of(target, "plain", torch.float32, **precision)
    report = sx.check_parity(step, batches, sessions={"s": sx.InStages(session)}, num_steps=4)
    assert report.ok, str(report)
    for _ in range(2):  # the check has put the session back
        sx.InStages(session).step(*batches[0])
    assert float(session.state["scaler.scale"]) == 2048


def test_a_batch_that_is_a_dict(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 3).double()

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.fc(x), labels)

    model = Model()
    step = sx.TrainStep(
        model, None, sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1), num_targets=0
    )
    x, labels = batch_of()
    batch = {"x": x, "labels": labels}
    sx.export(sx.capture(step, batch, staged=True), tmp_path / "step", "onnx")
    one, three = sx.load(tmp_path / "step"), sx.load(tmp_path / "step")
    one.step(batch)
    sx.InStages(three).step(batch)
    assert_equal_states(one.state, three.state)


def test_outputs_come_with_the_ascent() -> None:
    step = step_over("plain")
    x, y = batch_of()
    captured = sx.capture(step, (x, y), staged=True, return_outputs=True)
    session = sx.load(captured, target="onnx")
    expected = step.model(x).detach().numpy()
    np.testing.assert_allclose(session.ascent(x, y).outputs.numpy(), expected, rtol=1e-12)


# -- accumulation over calls ----------------------------------------------------------------------


def accumulated(session: sx.Session, parts: Sequence[Sequence[Any]], own: bool) -> sx.UpdateResult:
    """One step over several calls; with ``own``, each part has its own perturbation."""
    ascents, descents = [], []
    buffers = None
    for number, part in enumerate(parts):
        ascents.append(session.ascent(*part, buffers=buffers, part=number))
        buffers = ascents[-1].buffers
        if own:
            gradients = ascents[-1].gradients
            descents.append(
                session.descent(*part, gradients=gradients, buffers=buffers, part=number)
            )
            buffers = descents[-1].buffers
    if not own:
        joined = mean([ascent.gradients for ascent in ascents])
        for number, part in enumerate(parts):
            descents.append(session.descent(*part, gradients=joined, buffers=buffers, part=number))
            buffers = descents[-1].buffers
    return session.update(mean([d.gradients for d in descents]), buffers=buffers)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("per", ["batch", "micro_batch"])
@pytest.mark.parametrize("stats", ["ascent", "both"])
def test_parts_over_several_calls(target: str, per: str, stats: str) -> None:
    """Equal to the eager step that divides its batch, running statistics too."""
    semantics = {"micro_batches": 4, "perturbation_per": per, "running_stats": stats}
    eager = step_over("norm", semantics=semantics)
    session = session_of(target, "norm", semantics={"running_stats": stats})
    for seed in range(3):
        x, y = batch_of(16, seed=seed)
        parts = list(zip(x.chunk(4), y.chunk(4), strict=True))
        eager(x, y)
        assert bool(accumulated(session, parts, own=per == "micro_batch").finite)
    named = {**dict(eager.model.named_parameters()), **dict(eager.model.named_buffers())}
    expected = {name: value.detach().numpy() for name, value in named.items()}
    assert_equal_states(expected, {name: session.state[name] for name in expected}, rel=1e-11)


def test_parts_draw_other_numbers_and_both_passes_the_same() -> None:
    """Of every part: what one target draws, another draws, too."""
    x, y = batch_of()
    found: dict[str, list[np.ndarray]] = {}
    for target in ("onnx", "torchscript", "torch-compile"):
        session = session_of(target, "dropout")
        losses = [session.ascent(x, y, part=part) for part in (0, 0, 1)]
        weights = [np.asarray(result.gradients["0.weight"]) for result in losses]
        np.testing.assert_array_equal(weights[0], weights[1])
        assert not np.allclose(weights[0], weights[2])
        # Without a perturbation the second pass is the first one.
        same = session.descent(x, y, gradients=losses[2].gradients, part=1, rho=0.0)
        np.testing.assert_allclose(np.asarray(same.gradients["0.weight"]), weights[2], rtol=1e-12)
        found[target] = weights
    for target in ("torchscript", "torch-compile"):
        for one, other in zip(found["onnx"], found[target], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-15)


def test_a_step_of_the_base_optimizer() -> None:
    """Periodic SAM in stages: between its steps, ``update`` gets the gradient of the first pass."""
    step = step_over("plain", optimizer={"every": 2})
    session = session_of("onnx", "plain", optimizer={"every": 2})
    for seed in range(4):
        batch = batch_of(seed=seed)
        step(*batch)
        ascent = session.ascent(*batch)
        gradients = ascent.gradients
        if seed % 2 == 0:
            gradients = session.descent(*batch, gradients=gradients).gradients
        session.update(gradients)
    for name, value in step.model.named_parameters():
        np.testing.assert_allclose(session.state[name], value.detach().numpy(), rtol=1e-12)
    # And the step that is one graph goes on from there: its number is 4, so it is one of SAM.
    assert float(session.step(*batch_of()).perturbation_norm) > 0


# -- what is not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("target", [*TARGETS, "torch-compile"])
@pytest.mark.parametrize("where", ["ascent", "descent", "norm"])
def test_what_is_not_finite_in_any_part_is_seen_by_the_update(target: str, where: str) -> None:
    """One of three parts: NaN in its batch, in its second pass only, or too large a gradient."""
    session = session_of(target, "norm", torch.float32)
    before = session.state
    parts = [batch_of(8, torch.float32, seed) for seed in range(3)]
    if where == "ascent":
        parts[1][0] = parts[1][0] * float("nan")
    ascents = [session.ascent(*part) for part in parts]
    gradients = mean([ascent.gradients for ascent in ascents])
    if where == "norm":
        # The squares overflow, no element does; the perturbation becomes 0, and the loss finite.
        gradients = {name: value * np.float32(1e25) for name, value in gradients.items()}
    buffers = ascents[-1].buffers
    if where == "descent":
        parts[1][0] = parts[1][0] * float("inf")
    descents = [session.descent(*part, gradients=gradients, buffers=buffers) for part in parts]
    result = session.update(mean([d.gradients for d in descents]), buffers=buffers)
    assert not bool(result.finite)
    after = session.state
    for name in before:
        changed = name == "counter.step"
        assert np.array_equal(before[name], after[name]) != changed, name
    assert session.step_count == 1


@pytest.mark.parametrize("target", TARGETS)
def test_a_loss_that_overflows_alone_is_seen(target: str) -> None:
    """Its gradient is finite: the mark in one tensor tells."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    def loss_fn(output: Tensor, y: Tensor) -> Tensor:
        offset = torch.where(y[0] == 2, torch.inf, 0.0)
        return nn.functional.cross_entropy(output, y) + offset

    torch.manual_seed(0)
    model = Model()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    session = session_of_any(sx.TrainStep(model, loss_fn, sam), target)
    x, y = batch_of(8, torch.float32)
    y[0] = 2
    before = session.state
    ascent = session.ascent(x, y)
    assert np.isinf(float(ascent.loss))
    nans = {name for name, value in ascent.gradients.items() if np.isnan(value.numpy()).any()}
    assert nans == {"fc.bias"}
    whole = session.step(x, y)
    stages = sx.InStages(session).step(x, y)
    assert not bool(whole.finite)
    assert not bool(stages.finite)
    assert_equal_states(before, session.state)


def session_of_any(step: sx.TrainStep, target: str) -> sx.Session:
    captured = sx.capture(step, batch_of(8, torch.float32), staged=True)
    return sx.load(captured, target=target)


@pytest.mark.parametrize("target", TARGETS)
def test_an_overflow_lowers_the_scale(target: str) -> None:
    """Of float16, in the first pass and in the second; the next step is fine."""
    scaling = sx.LossScaling(init_scale=2.0**16)
    precision = {"autocast": torch.float16, "loss_scaling": scaling}
    session = session_of(target, "plain", torch.float32, **precision)
    stages = sx.InStages(session)
    x, y = batch_of(8, torch.float32)
    weights = session.state["0.weight"]
    for index, (scale, rho) in enumerate([(1e6, 0.05), (1.0, 1e30)]):
        result = stages.step(x * scale, y, rho=rho)
        assert not bool(result.finite)
        assert float(session.state["scaler.scale"]) == 2.0 ** (15 - index)
        np.testing.assert_array_equal(session.state["0.weight"], weights)
    for _ in range(6):  # down to a scale that fits
        result = stages.step(x, y, rho=0.05)
    assert bool(result.finite)
    assert not np.array_equal(session.state["0.weight"], weights)


def test_raise_says_so_and_changes_nothing() -> None:
    session = session_of("onnx", "norm", semantics={"on_nonfinite": "raise"})
    x, y = batch_of()
    before = session.state
    ascent = session.ascent(x * float("nan"), y)
    descent = session.descent(x, y, gradients=ascent.gradients, buffers=ascent.buffers)
    with pytest.raises(SessionError, match="not finite"):
        session.update(descent.gradients, buffers=descent.buffers, lr=0.5)
    assert_equal_states(before, session.state)
    assert session.step_count == 0
    assert session.hyper["lr"] == (0.1,)


# -- what is whose --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [*TARGETS, "torch-compile"])
def test_only_the_update_changes_the_session(target: str) -> None:
    """And what a stage returned stays what it was, in later steps too."""
    session = session_of(target, "norm")
    before = session.state
    x, y = batch_of()
    ascent = session.ascent(x, y)
    first = {name: value.numpy() for name, value in ascent.gradients.items()}
    statistics = {name: value.numpy() for name, value in ascent.buffers.items()}
    descent = session.descent(x, y, gradients=ascent.gradients, buffers=ascent.buffers)
    assert_equal_states(before, session.state)
    session.update(descent.gradients, buffers=descent.buffers)
    for seed in range(1, 3):
        sx.InStages(session).step(*batch_of(seed=seed))
    for name, value in first.items():
        np.testing.assert_array_equal(ascent.gradients[name].numpy(), value)
    for name, value in statistics.items():
        np.testing.assert_array_equal(ascent.buffers[name].numpy(), value)


def test_hyper_parameters_are_kept() -> None:
    session = session_of("onnx", "plain")
    x, y = batch_of()
    ascent = session.ascent(x, y)
    descent = session.descent(x, y, gradients=ascent.gradients, rho=0.2)
    assert float(descent.perturbation_norm) == pytest.approx(0.2)
    session.update(descent.gradients, lr=0.01)
    assert session.hyper == {"lr": (0.01,), "rho": (0.2,)}


def test_gradients_of_another_target() -> None:
    """Values of one session are taken by a session of another runtime."""
    sessions = [session_of(target, "norm") for target in ("onnx", "torchscript")]
    x, y = batch_of()
    expected = session_of("onnx", "norm")
    expected.step(x, y)
    for one, other in (sessions, sessions[::-1]):
        ascent = one.ascent(x, y)
        descent = other.descent(x, y, gradients=ascent.gradients, buffers=ascent.buffers)
        restored = one.state
        one.update(descent.gradients, buffers=descent.buffers)
        assert_equal_states(expected.state, one.state, rel=1e-12)
        one.set_state(restored)


def test_the_module_alone(tmp_path: Path) -> None:
    """TorchScript without this package, as C++ calls it: one stage returns what the next takes."""
    step = step_over("norm", semantics={"running_stats": "both"})
    sx.export(sx.capture(step, batch_of(), staged=True), tmp_path / "step", "torchscript")
    module = torchscript.load_scripted(tmp_path / "step" / "step.pt", torch.device("cpu"))
    none: dict[str, Tensor] = {}
    for seed in range(3):
        x, y = batch_of(seed=seed)
        expected = step(x, y)
        found = module.update(module.descent(x, y, module.ascent(x, y, none)))
        assert float(found["loss"]) == pytest.approx(float(expected.loss), rel=1e-12)
        assert bool(found["finite"])
    for name, value in step.model.state_dict().items():
        np.testing.assert_allclose(getattr_path(module, name), value, rtol=1e-12)
    assert module.step_count == 3
    with pytest.raises(torch.jit.Error, match="descent needs .*running.1.running_mean"):
        module.descent(x, y, none)
    wrong = module.ascent(x, y, none)
    wrong["gradient.0.bias"] = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(torch.jit.Error, match="gradient.0.bias"):
        module.descent(x, y, wrong)


def getattr_path(module: Any, name: str) -> np.ndarray:
    for part in name.split("."):
        module = getattr(module, part)
    return module.detach().numpy()


# -- mistakes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session() -> sx.Session:
    return session_of("onnx", "norm")


def test_what_is_missing_or_does_not_fit(session: sx.Session) -> None:
    x, y = batch_of()
    before = session.state
    ascent = session.ascent(x, y)
    g, buffers = ascent.gradients, ascent.buffers
    zeros = {name: np.zeros_like(value.numpy()) for name, value in g.items()}
    cases: list[tuple[str, Any]] = [
        ("needs buffers", lambda: session.descent(x, y, gradients=g)),
        ("needs buffers", lambda: session.update(g)),
        ("lack '0.bias'", lambda: session.update({"0.weight": g["0.weight"]}, buffers=buffers)),
        (
            "have 'bias', which is unknown",
            lambda: session.descent(x, y, gradients={**g, "bias": 0}, buffers=buffers),
        ),
        ("expected a dict", lambda: session.update(list(g.values()), buffers=buffers)),
        (
            "gradients of update: tensor 'perturbed_gradient.0.bias' has shape",
            lambda: session.update({**zeros, "0.bias": np.zeros(3)}, buffers=buffers),
        ),
        (
            "has dtype float32; expected float64",
            lambda: session.update({**zeros, "0.bias": np.zeros(8, np.float32)}, buffers=buffers),
        ),
        ("is a float; expected", lambda: session.update({**zeros, "0.bias": 0.0}, buffers=buffers)),
        ("part=-1", lambda: session.ascent(x, y, part=-1)),
        ("part=True", lambda: session.ascent(x, y, part=True)),
        ("Size 1 in dimension 0", lambda: session.ascent(x[:1], y[:1])),
        ("ascent takes 2 tensors", lambda: session.ascent(x)),
        ("Unknown hyper-parameter", lambda: session.update(g, buffers=buffers, momentum=0.5)),
    ]
    for message, call in cases:
        with pytest.raises(SessionError, match=message):
            call()
    assert_equal_states(before, session.state)
    assert session.step_count == 0


def test_a_session_without_stages() -> None:
    session = sx.load(sx.capture(step_over("plain"), batch_of()), target="onnx")
    with pytest.raises(SessionError, match=r"No program 'ascent'.*staged=True"):
        session.ascent(*batch_of())


def test_what_is_not_three_calls_is_not_in_stages() -> None:
    with pytest.raises(SessionError, match="every=2"):
        sx.InStages(session_of("onnx", "plain", optimizer={"every": 2}))
    with pytest.raises(SessionError, match="no stages"):
        sx.InStages(sx.load(sx.capture(step_over("plain"), batch_of()), target="onnx"))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (
            "perturbation_per='micro_batch'",
            {"semantics": {"micro_batches": 2, "perturbation_per": "micro_batch"}},
        ),
        ("ascent_steps=2", {"optimizer": {"ascent_steps": 2}}),
        ("every=2", {"optimizer": {"every": 2, "variant": sx.GSAM()}}),
    ],
)
def test_steps_that_have_no_stages(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(StepConfigError, match=message):
        sx.capture(step_over("plain", **options), batch_of(), staged=True)


def test_torchs_own_generator_has_no_stages() -> None:
    """The same draws in both passes cannot come from it; fresh ones can."""
    with pytest.raises(StepConfigError, match="torch's own generator"):
        sx.capture(step_over("dropout", semantics={"generator": "torch"}), batch_of(), staged=True)
    fresh = {"generator": "torch", "randomness": "fresh"}
    session = session_of("torchscript", "dropout", semantics=fresh)
    assert bool(sx.InStages(session).step(*batch_of()).finite)


def test_ort_artifacts_has_no_stages() -> None:
    captured = sx.capture(
        step_over("plain", torch.float32), batch_of(8, torch.float32), staged=True
    )
    with pytest.raises(sx.LoweringError, match="no stages"):
        sx.load(captured, target="ort-artifacts")
