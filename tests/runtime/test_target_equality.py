"""Every target against an eager `TrainStep`, at several batch sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sam_export as sx
from tests.runtime.target_cases import images, make


def eager_state(step: sx.TrainStep) -> dict[str, np.ndarray]:
    state = {n: v.detach() for n, v in (*step.model.named_parameters(),)}
    state |= dict(step.model.named_buffers())
    for name, p in step.model.named_parameters():
        for key, value in step.optimizer.state[p].items():
            state[f"slot.{key}.{name}"] = value
    return {name: value.numpy().copy() for name, value in state.items()}


# Relative to the change of a tensor over four steps. float64: a few hundred roundings of 2e-16 over
# a change that is 1e-3 of the weight. float32: the same with 6e-8, where Adam divides by gradients
# that are themselves rounded (measured between eager and eager with the batch permuted: 2e-3).
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-2}


# Compiling takes half a minute a case; each dtype and each optimizer once is enough there.
CASES = [
    ("onnx", "sgd", torch.float64),
    ("onnx", "sgd", torch.float32),
    ("onnx", "adamw", torch.float64),
    ("onnx", "adamw", torch.float32),
    ("onnx-training", "sgd", torch.float64),
    ("onnx-training", "adamw", torch.float32),
    ("ort-artifacts", "sgd", torch.float32),
    ("ort-artifacts", "adamw", torch.float32),
    ("torch-compile", "sgd", torch.float32),
    ("torch-compile", "adamw", torch.float64),
    ("torchscript", "sgd", torch.float32),
    ("torchscript", "sgd", torch.float64),
    ("torchscript", "adamw", torch.float32),
    ("torchscript", "adamw", torch.float64),
    ("aot-inductor", "sgd", torch.float32),
    ("aot-inductor", "adamw", torch.float64),
]


@pytest.mark.parametrize(("target", "base", "dtype"), CASES, ids=str)
def test_a_target_equals_eager_at_every_batch_size(
    target: str, base: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Captured at 6 examples; run at 6, 20, 5 and 1, with a learning rate that changes."""
    step = make(dtype, base)
    captured = sx.capture(step, images(6, dtype))
    artifact = sx.export(captured, tmp_path / "step", target=target)
    session = sx.load(tmp_path / "step", threads=1)
    before = session.state
    for name, value in eager_state(step).items():
        np.testing.assert_array_equal(before[name], value)
    if target == "onnx":
        assert set(artifact.details["in_place"].values()) == {""}
    for index, count in enumerate((6, 20, 5, 1)):
        lr = 0.01 / (index + 1)
        step.optimizer.param_groups[0]["lr"] = lr
        found, expected = session.step(*images(count, dtype), lr=lr), step(*images(count, dtype))
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-4)
    after, wanted = session.state, eager_state(step)
    for name in wanted:
        assert after[name].shape == wanted[name].shape
        moved = np.linalg.norm(np.asarray(wanted[name] - before[name], np.float64))
        error = np.linalg.norm(np.asarray(after[name] - wanted[name], np.float64))
        assert moved > 0, name
        assert error <= TOLERANCE[dtype] * moved, (name, error / moved)

    x, y = images(9, dtype)
    step.model.eval()
    outputs = step.model(x).detach()
    np.testing.assert_allclose(session.evaluate(x), outputs.numpy(), rtol=1e-3, atol=1e-4)
    loss = float(nn.functional.cross_entropy(outputs, y))
    assert session.evaluate_loss(x, y) == pytest.approx(loss, rel=1e-3)
