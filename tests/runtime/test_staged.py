"""A step in its three stages: ascent, descent, update, and what may stand between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from tests.parity.cases import batches_for, step_of
from tests.runtime.staged_cases import (
    TARGETS,
    assert_equal_states,
    batch_of,
    folder_of,
    mean,
    session_of,
    step_over,
)

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
    folder = folder_of("onnx", repr(("norm", torch.float64, sorted(options.items()))))
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
