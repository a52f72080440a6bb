"""Every target as a user runs it: export, load, step, checkpoints, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export.runtime.detect import require_onnxruntime
from tests.runtime.target_cases import RUN_HERE, TARGETS, images, make
from tests.step.test_sam import batches, small_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step in the form of every target, each in the folder of its name."""
    folder = tmp_path_factory.mktemp("exported")
    captured = sx.capture(make(torch.float32, "adamw"), images(6, torch.float32))
    for target in TARGETS:
        sx.export(captured, folder / target, target=target)
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_results_stay_valid_after_later_steps(target: str, exported: Path) -> None:
    session = sx.load(exported / target, threads=1)
    results = [session.step(*images(6, torch.float32, seed)) for seed in range(4)]
    late = [float(result.loss) for result in results]
    again = sx.load(exported / target, threads=1)
    early = [float(again.step(*images(6, torch.float32, seed)).loss) for seed in range(4)]
    assert late == early
    assert len(set(late)) == 4


@pytest.mark.parametrize("target", TARGETS)
def test_a_step_that_is_not_finite_changes_nothing(target: str, exported: Path) -> None:
    session = sx.load(exported / target, threads=1)
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
def test_a_checkpoint_of_every_target_restores_into_every_other(
    target: str, exported: Path, tmp_path: Path
) -> None:
    session = sx.load(exported / target, threads=1)
    session.step(*images(6, torch.float32), lr=0.02)
    session.save(tmp_path / "run.ckpt")
    for other in RUN_HERE:
        restored = sx.load(exported / other, threads=1)
        restored.restore(tmp_path / "run.ckpt")
        for name, value in session.state.items():
            np.testing.assert_array_equal(restored.state[name], value, err_msg=name)
        assert (restored.step_count, restored.hyper["lr"]) == (1, (0.02,))


@pytest.mark.parametrize("target", TARGETS)
def test_a_batch_may_be_values_of_onnx_runtime(target: str, exported: Path) -> None:
    """Which a machine without torch keeps on the device, from step to step."""
    made = require_onnxruntime().OrtValue.ortvalue_from_numpy
    plain, other = sx.load(exported / target, threads=1), sx.load(exported / target, threads=1)
    for count in (6, 4):
        arrays = [tensor.numpy() for tensor in images(count, torch.float32)]
        values = [made(array) for array in arrays]
        assert float(plain.step(*arrays).loss) == float(other.step(*values).loss)
        np.testing.assert_array_equal(plain.evaluate(arrays[0]), other.evaluate(values[0]))
    for name, value in plain.state.items():
        np.testing.assert_array_equal(other.state[name], value, err_msg=name)
    x, y = arrays
    wrong = r"'x' has dtype float64; expected float32\. Cast it: x\.numpy\(\)\.astype\('float32'\)"
    with pytest.raises(sx.SessionError, match=wrong):
        other.step(made(x.astype(np.float64)), y)
    with pytest.raises(sx.SessionError, match=r"'x' has shape \[4, 16\], 2 dimensions; expected 4"):
        other.step(made(x.reshape(4, 16)), y)


@pytest.mark.parametrize("target", ["torch-compile", "torchscript", "aot-inductor"])
def test_tensors_of_any_layout_give_the_same_step(target: str, exported: Path) -> None:
    """A batch that is a view, and one that asks for a gradient."""
    x, y = images(6, torch.float32)
    plain, other = sx.load(exported / target, threads=1), sx.load(exported / target, threads=1)
    transposed = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).requires_grad_()
    wide = torch.stack([y, y], 1)[:, 0]
    assert not transposed.is_contiguous()
    assert float(plain.step(x, y).loss) == pytest.approx(float(other.step(transposed, wide).loss))
    for name, value in plain.state.items():
        np.testing.assert_allclose(other.state[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    single = x[:1].numpy()
    assert single[::-1].flags.c_contiguous  # for NumPy; torch takes no negative stride
    np.testing.assert_array_equal(plain.evaluate(single[::-1]), plain.evaluate(single))


@pytest.mark.parametrize("target", ["torch-compile", "torchscript", "onnx"])
def test_one_tensor_given_twice_stays_two_inputs(target: str) -> None:
    """As an autoencoder gets its batch; what was compiled for that must not outlive it."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    captured = sx.capture(sx.TrainStep(model, nn.MSELoss(), sam), (x, y))
    twice, plain = (sx.load(captured, target=target, threads=1) for _ in range(2))
    for first, second in ((x, x), (x, y), (y, y)):
        found = twice.step(first, second)
        assert float(found.loss) == float(plain.step(first.clone(), second.clone()).loss)
        assert vars(first) == {}  # Dynamo keeps its marks on the tensors that it sees
    for name, value in plain.state.items():
        np.testing.assert_array_equal(twice.state[name], value, err_msg=name)


@pytest.mark.parametrize("target", TARGETS)
def test_not_finite_is_ignored_when_asked(target: str) -> None:
    step = make(torch.float32, "sgd", on_nonfinite="ignore")
    session = sx.load(sx.capture(step, images(6, torch.float32)), target=target, threads=1)
    x, y = images(6, torch.float32)
    assert not bool(session.step(x * float("nan"), y).finite)
    assert np.isnan(session.state["head.weight"]).all()


@pytest.mark.parametrize(
    ("target", "kinds"),
    [
        ("torch-compile", ("same", "fresh")),
        ("torchscript", ("same", "fresh")),
        ("aot-inductor", ("same",)),  # it compiles what torch-compile does, for longer
    ],
)
def test_dropout_draws_as_eager_does(target: str, kinds: tuple[str, ...]) -> None:
    """From torch's generator: after the same seed both have the same losses, in both kinds."""
    for randomness in kinds:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double()
        sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
        semantics = sx.Semantics(randomness=randomness, generator="torch")  # type: ignore[arg-type]
        step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam, semantics=semantics)
        data = batches(3, torch.float64)
        session = sx.load(sx.capture(step, data[0]), target=target, threads=1)
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
            return {"logits": logits, "pair": (logits * 2, None), "weight": self.a.weight}

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
    weight = model.a.weight.detach().numpy()  # as it was before the step
    np.testing.assert_array_equal(np.asarray(result.outputs["weight"]), weight)
    assert (session.state["a.weight"] != weight).any()
    logits = expected["logits"].detach().numpy()
    np.testing.assert_allclose(np.asarray(result.outputs["logits"]), logits, rtol=1e-5, atol=1e-6)
    assert result.outputs["pair"][1] is None
    evaluated = session.evaluate({"left": batch["left"], "right": batch["right"]})
    assert set(evaluated) == {"logits", "pair", "weight"}
    session.step(batch)
    np.testing.assert_array_equal(np.asarray(result.outputs["weight"]), weight)


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
    with pytest.raises(sx.RuntimeUnavailableError, match="CUDA"):
        sx.load(captured, target="torchscript", device="cuda")
    with pytest.raises(sx.LoweringError, match="finds no CUDA device.*on a machine like the one"):
        sx.load(captured, target="aot-inductor", device="cuda")
    with pytest.raises(sx.LoweringError, match="not made for a device: export it without one"):
        sx.export(captured, tmp_path / "step", target="torchscript", device="cuda")
    assert list(tmp_path.iterdir()) == []
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
    """Graph files hold no weights: not as constants, not as example inputs.

    A scripted module holds its state, once.
    """
    model = nn.Sequential(nn.Linear(5, 4000), nn.Linear(4000, 1000), nn.Linear(1000, 3))
    sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    captured = sx.capture(sx.TrainStep(model, nn.CrossEntropyLoss(), sam), batches(1)[0])
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for target in TARGETS:
        artifact = sx.export(captured, tmp_path / target, target=target)
        for program in artifact.files:
            held = 1.1 if target == "torchscript" else 0.5
            assert artifact.file(program).stat().st_size < weights * held
