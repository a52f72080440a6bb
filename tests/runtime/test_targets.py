"""Both targets as a user runs them: export, load, step, against an eager `TrainStep`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export.runtime.detect import require_onnxruntime
from tests.step.test_sam import batches, small_model

TARGETS = ["onnx", "torch-compile"]


class Small(nn.Module):
    """A convolution, BatchNorm and pooling; a tied scalar so that a state tensor has no size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))) * self.scale
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


def images(count: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * count + seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return torch.randn(count, 1, 4, 4, generator=generator, dtype=dtype), labels


def make(dtype: torch.dtype, base: str, **semantics: Any) -> sx.TrainStep:
    torch.manual_seed(0)
    model = Small().to(dtype)
    bases: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
        "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.05}),
    }
    sam = sx.SAM(model.parameters(), bases[base][0], rho=0.05, **bases[base][1])
    return sx.TrainStep(model, nn.CrossEntropyLoss(), sam, semantics=sx.Semantics(**semantics))


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
    ("torch-compile", "sgd", torch.float32),
    ("torch-compile", "adamw", torch.float64),
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


@pytest.mark.parametrize("target", TARGETS)
def test_results_stay_valid_after_later_steps(target: str) -> None:
    step = make(torch.float32, "sgd")
    session = sx.load(sx.capture(step, images(6, torch.float32)), target=target, threads=1)
    results = [session.step(*images(6, torch.float32, seed)) for seed in range(4)]
    late = [float(result.loss) for result in results]
    again = sx.load(sx.capture(step, images(6, torch.float32)), target=target, threads=1)
    early = [float(again.step(*images(6, torch.float32, seed)).loss) for seed in range(4)]
    assert late == early
    assert len(set(late)) == 4


@pytest.mark.parametrize("target", TARGETS)
def test_a_step_that_is_not_finite_changes_nothing(target: str) -> None:
    step = make(torch.float32, "adamw")
    session = sx.load(sx.capture(step, images(6, torch.float32)), target=target, threads=1)
    session.step(*images(6, torch.float32))
    before = session.state
    x, y = images(6, torch.float32)
    x[2, 0, 1, 1] = float("nan")
    assert not bool(session.step(x, y).finite)
    for name, value in session.state.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert bool(session.step(*images(6, torch.float32)).finite)
    assert any((session.state[name] != before[name]).any() for name in before)


@pytest.mark.parametrize("target", TARGETS)
def test_not_finite_is_ignored_when_asked(target: str) -> None:
    step = make(torch.float32, "sgd", on_nonfinite="ignore")
    session = sx.load(sx.capture(step, images(6, torch.float32)), target=target, threads=1)
    x, y = images(6, torch.float32)
    assert not bool(session.step(x * float("nan"), y).finite)
    assert np.isnan(session.state["head.weight"]).all()


def test_dropout_in_torch_compile_draws_as_eager_does() -> None:
    """Mask for mask: after the same seed both have the same losses, in both kinds of draw."""
    for randomness in ("same", "fresh"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double()
        sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
        semantics = sx.Semantics(randomness=randomness)  # type: ignore[arg-type]
        step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam, semantics=semantics)
        data = batches(3, torch.float64)
        session = sx.load(sx.capture(step, data[0]), target="torch-compile", threads=1)
        losses: list[list[float]] = [[], []]
        for run, results in ((session.step, losses[0]), (step, losses[1])):
            torch.manual_seed(7)
            for batch in data:
                result = run(*batch)
                results += [float(result.loss), float(result.perturbed_loss)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("target", TARGETS)
def test_structured_batches_and_outputs(target: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(4, 3)

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
            logits = self.a(left) + self.b(right)
            return {"logits": logits, "pair": (logits * 2, None)}

    def loss(output: dict[str, Any], label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output["logits"], label)

    torch.manual_seed(0)
    model = Two()
    step = sx.TrainStep(model, loss, sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1))
    batch = {
        "left": torch.randn(6, 5),
        "right": torch.randn(6, 4),
        "label": torch.randint(0, 3, (6,)),
    }
    captured = sx.capture(step, batch, return_outputs=True)
    session = sx.load(captured, target=target, threads=1)
    expected = model(batch["left"], batch["right"])
    result = session.step(batch)
    logits = expected["logits"].detach().numpy()
    np.testing.assert_allclose(np.asarray(result.outputs["logits"]), logits, rtol=1e-5, atol=1e-6)
    assert result.outputs["pair"][1] is None
    evaluated = session.evaluate({"left": batch["left"], "right": batch["right"]})
    assert set(evaluated) == {"logits", "pair"}


def test_cuda_is_refused_where_there_is_none(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    captured = sx.capture(
        sx.TrainStep(
            model := small_model(),
            nn.CrossEntropyLoss(),
            sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1),
        ),
        batches(1)[0],
    )
    with pytest.raises(sx.RuntimeUnavailableError, match="CUDA"):
        sx.load(captured, target="torch-compile", device="cuda")
    if "CUDAExecutionProvider" not in require_onnxruntime().get_available_providers():
        with pytest.raises(sx.RuntimeUnavailableError, match="CUDAExecutionProvider"):
            sx.load(captured, target="onnx", device="cuda")


def test_a_graph_that_is_not_the_contracts_is_refused(tmp_path: Path) -> None:
    """The hash of the manifest is right, the graph is of another model."""
    from sam_export.artifact.folder import write_artifact
    from sam_export.lower.registry import lower

    def captured_with(width: int) -> sx.CapturedStep:
        model = nn.Sequential(nn.Linear(5, width), nn.Linear(width, 3))
        sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        return sx.capture(sx.TrainStep(model, nn.CrossEntropyLoss(), sam), batches(1)[0])

    ours, other = lower(captured_with(7), "onnx"), lower(captured_with(8), "onnx")
    ours.files["step"] = other.files["step"]
    write_artifact(ours, tmp_path / "mixed")
    with pytest.raises(sx.ArtifactError, match=r"'0\.weight'.*contract says float32\[7, 5\]"):
        sx.load(tmp_path / "mixed")


def test_load_says_what_it_needs(tmp_path: Path) -> None:
    model = small_model()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    captured = sx.capture(sx.TrainStep(model, nn.CrossEntropyLoss(), sam), batches(1)[0])
    with pytest.raises(sx.SessionError, match="target"):
        sx.load(captured)
    sx.export(captured, tmp_path / "step", target="torch-compile")
    with pytest.raises(sx.SessionError, match="'torch-compile', not 'onnx'"):
        sx.load(tmp_path / "step", target="onnx")
    with pytest.raises(sx.ArtifactError, match="exists"):
        sx.export(captured, tmp_path / "step")


def test_the_state_is_stored_once(tmp_path: Path) -> None:
    """Graph files hold no weights: not as constants, not as example inputs."""
    model = nn.Sequential(nn.Linear(5, 2000), nn.Linear(2000, 400), nn.Linear(400, 3))
    sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    captured = sx.capture(sx.TrainStep(model, nn.CrossEntropyLoss(), sam), batches(1)[0])
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for target in TARGETS:
        artifact = sx.export(captured, tmp_path / target, target=target)
        for program in artifact.files:
            assert artifact.file(program).stat().st_size < weights / 2
