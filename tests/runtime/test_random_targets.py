"""Random numbers on every target: the same bits as eager, kept over save and restore."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export.artifact import philox
from sam_export.parity.oracle_random import OracleDraws
from tests.runtime.target_cases import TARGETS


class Light(nn.Module):
    """Returns what it draws, beside logits that depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = torch.tanh(self.first(x))
        uniform = torch.rand(2 * x.shape[0], 3, dtype=x.dtype).unflatten(0, (-1, 2))
        dropout = nn.functional.dropout(torch.ones_like(hidden), 0.3)
        return self.last(hidden * dropout) * uniform[:, 0], {"dropout": dropout, "uniform": uniform}


class Draws(nn.Module):
    """All kinds of draws; returned, and with an effect on the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = torch.tanh(self.first(x))
        ones = torch.ones_like(hidden)
        drawn = {
            "dropout": nn.functional.dropout(ones, 0.3),
            "of values": torch.bernoulli(torch.sigmoid(hidden.detach())),
            "uniform": torch.rand(2 * x.shape[0], 3, dtype=x.dtype).unflatten(0, (-1, 2)),
            "normal": torch.randn_like(hidden),
            "exponential": torch.empty_like(hidden).exponential_(2.0),
            "integers": torch.randint(-3, 9, (x.shape[0], 4)),
            "order": torch.randperm(7),
        }
        self.seen.copy_(drawn["normal"][0])
        noise = drawn["normal"] + drawn["uniform"].mean() + drawn["exponential"]
        hidden = hidden * drawn["dropout"] + 0.01 * noise * drawn["of values"]
        return self.last(hidden) + drawn["integers"][:, :3] * 0.01, drawn


def loss(output: tuple[Tensor, Any], target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output[0], target)


def drawing(dtype: torch.dtype, kind: type[nn.Module] = Light, **semantics: Any) -> sx.TrainStep:
    torch.manual_seed(0)
    model = kind().to(dtype)
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    return sx.TrainStep(
        model, loss, sam, semantics=sx.Semantics(**semantics), seed=-(2**62) + 12345
    )


def batch(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return torch.randn(count, 5, generator=generator, dtype=dtype), labels


SIZES = (6, 6, 9, 2)


# Inductor takes minutes for all kinds of draws; for those there is scripts/test-wide.
BITS = [
    *((target, torch.float32, Light) for target in ("torch-compile", "aot-inductor")),
    *(
        (t, dtype, Draws)
        for t in ("onnx", "torchscript")
        for dtype in (torch.float32, torch.float64)
    ),
]
WIDE = [
    pytest.param(target, dtype, Draws, marks=pytest.mark.wide)
    for target in ("torch-compile", "aot-inductor")
    for dtype in (torch.float32, torch.float64)
]


@pytest.mark.parametrize(("target", "dtype", "kind"), [*BITS, *WIDE])
def test_every_draw_has_the_bits_of_eager(
    target: str, dtype: torch.dtype, kind: type[nn.Module]
) -> None:
    """Over steps and batch sizes; and the integers and masks are the oracle's, too."""
    step = drawing(dtype, kind)
    data = [batch(count, dtype) for count in SIZES]
    captured = sx.capture(step, data[0], return_outputs=True)
    session = sx.load(captured, target=target, threads=1)
    for number, (x, y) in enumerate(data):
        with OracleDraws(step.seed, number):
            expected = step.model(x)[1]
        found, eager = session.step(x, y).outputs[1], step(x, y).outputs[1]
        for name, value in eager.items():
            array = np.asarray(found[name])
            # "of values" compares a draw with probabilities that are a rounding off.
            assert np.array_equal(array, value.numpy()), (name, number)
            if name in ("dropout", "uniform", "integers", "order"):
                assert np.array_equal(array, expected[name].numpy()), (name, number)
        for name, buffer in step.model.named_buffers():
            assert np.array_equal(session.state[name], buffer.numpy())
    assert session.state["counter.step"] == len(data) == step.step_count
    assert session.state["rng.seed"] == step.seed


@pytest.mark.parametrize("target", ["onnx", "torchscript"])
def test_fresh_draws_have_the_numbers_of_eager(target: str) -> None:
    step = drawing(torch.float64, randomness="fresh")
    data = [batch(count, torch.float64) for count in SIZES[:2]]
    session = sx.load(sx.capture(step, data[0]), target=target, threads=1)
    for x, y in data:
        found, eager = session.step(x, y), step(x, y)
        for name in ("loss", "perturbed_loss"):
            assert float(getattr(found, name)) == pytest.approx(
                float(getattr(eager, name)), rel=1e-12
            )


@pytest.mark.parametrize("target", TARGETS)
def test_a_restored_run_goes_on_with_the_same_masks(target: str, tmp_path: Path) -> None:
    """Saved in the middle; restored into a new session of this target, and one of another."""
    dtype = torch.float32 if target == "ort-artifacts" else torch.float64
    step = drawing(dtype)
    data = [batch(6, dtype)] * 4
    captured = sx.capture(step, data[0], return_outputs=True)
    sx.export(captured, tmp_path / "step", target=target)
    session = sx.load(tmp_path / "step", threads=1)
    for x, y in data[:2]:
        session.step(x, y)
    session.save(tmp_path / "run.ckpt")
    rest = [session.step(x, y) for x, y in data[2:]]
    again = sx.load(tmp_path / "step", threads=1)
    other = sx.load(captured, target="onnx" if target != "onnx" else "torchscript", threads=1)
    for restored in (again, other):
        restored.restore(tmp_path / "run.ckpt")
        for (x, y), expected in zip(data[2:], rest, strict=True):
            found = restored.step(x, y)
            for name, value in expected.outputs[1].items():
                assert np.array_equal(np.asarray(found.outputs[1][name]), np.asarray(value)), name
        assert restored.state["counter.step"] == 4
    for name, value in session.state.items():
        assert np.array_equal(again.state[name], value), name


@pytest.mark.parametrize(
    ("target", "on_nonfinite"),
    [
        *((t, choice) for t in ("onnx", "torchscript") for choice in ("skip", "raise", "ignore")),
        ("torch-compile", "skip"),
    ],
)
def test_the_step_number_of_a_step_that_is_not_finite(target: str, on_nonfinite: str) -> None:
    """It counts as eager does: not where the step raises; and the draws go on from there."""
    step = drawing(torch.float32, on_nonfinite=on_nonfinite)
    x, y = batch(6, torch.float32)
    session = sx.load(sx.capture(step, (x, y), return_outputs=True), target=target, threads=1)
    before = session.state
    bad = x * float("nan")
    if on_nonfinite == "raise":
        for run in (session.step, step):
            with pytest.raises(sx.SamExportError, match="not finite"):
                run(bad, y)
    else:
        assert not bool(session.step(bad, y).finite)
        step(bad, y)
    after = session.state
    assert int(after["counter.step"]) == step.step_count == int(on_nonfinite != "raise")
    assert session.step_count == step.step_count
    if on_nonfinite != "ignore":
        for name in before.keys() - {"counter.step"}:
            assert np.array_equal(before[name], after[name]), name
    found, eager = session.step(x, y), step(x, y)
    mask = np.asarray(found.outputs[1]["dropout"])
    assert np.array_equal(mask, eager.outputs[1]["dropout"].numpy())


@pytest.mark.parametrize("target", ["onnx", "torchscript"])
def test_evaluation_draws_by_the_step_number(target: str) -> None:
    class Sampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y if self.training else y + torch.rand(x.shape[0], 3)

    torch.manual_seed(0)
    model = Sampling()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.0)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam, seed=3)
    x, y = batch(6, torch.float32)
    session = sx.load(sx.capture(step, (x, y)), target=target, threads=1)
    plain = model(x).detach().numpy()
    for number in range(2):
        words = philox.random_words(3, number, philox.EVALUATION, 18).reshape(6, 3)
        uniform = ((words.astype(np.int64) + 2**31) >> 8) * np.float32(2.0**-24)
        for _ in range(2):
            np.testing.assert_allclose(session.evaluate(x), plain + uniform, rtol=0, atol=1e-6)
        session.step(x, y)


def test_an_eager_step_goes_on_where_a_session_stands_and_back() -> None:
    step = drawing(torch.float64)
    x, y = batch(6, torch.float64)
    captured = sx.capture(step, (x, y), return_outputs=True)
    session, other = (sx.load(captured, target="torchscript", threads=1) for _ in range(2))
    for _ in range(2):
        session.step(x, y)
    session.load_into(step)
    assert step.step_count == 2
    other.load_from(step)
    assert other.step_count == 2
    eager = step(x, y).outputs[1]["dropout"].numpy()
    for each in (session, other):
        assert np.array_equal(np.asarray(each.step(x, y).outputs[1]["dropout"]), eager)
    step.seed, step.step_count = 99, 7
    session.load_from(step)
    assert (int(session.state["rng.seed"]), int(session.state["counter.step"])) == (99, 7)
    for arguments in ((step.model,), (step, step.optimizer)):
        with pytest.raises(sx.SessionError, match="a TrainStep alone"):
            session.load_into(*arguments)


@pytest.mark.parametrize("target", ["onnx", "torchscript"])
def test_a_model_may_hold_constants(target: str) -> None:
    """They come before the inputs of the exported program, whose sizes name those of the draws."""

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.factors = nn.Linear(5, 3), torch.tensor([1.0, 2.0, 0.5])

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.dropout(self.layer(x), 0.3) * self.factors
            return x + torch.tensor([0.5, -1.0, 2.0])

    torch.manual_seed(0)
    model = Weighted()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam, seed=1)
    session = sx.load(sx.capture(step, batch(6, torch.float32)), target=target, threads=1)
    for count in SIZES:
        x, y = batch(count, torch.float32)
        assert float(session.step(x, y).loss) == pytest.approx(float(step(x, y).loss), rel=1e-5)


def test_the_manifest_says_who_makes_the_words(tmp_path: Path) -> None:
    step = drawing(torch.float32)
    captured = sx.capture(step, batch(6, torch.float32))
    for target, made_by in (("onnx", "session"), ("torchscript", "graph")):
        sx.export(captured, tmp_path / target, target=target)
        details = json.loads((tmp_path / target / "manifest.json").read_text())["details"]
        numbers = details["random_numbers"]
        assert (numbers["generator"], numbers["made_by"]) == ("philox4x32-10", made_by)
        if target == "onnx":
            inputs = {item["input"]: item["size"] for item in numbers["inputs"]["step"]}
            assert inputs == {"random_words.0": ["2*batch", 3], "random_mask.2": ["batch", 6]}
            (mask,) = (i for i in numbers["inputs"]["step"] if "threshold" in i)
            assert mask["threshold"] == round(0.7 * 2**32) - 2**31


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of target onnx; to be copied before it is changed."""
    path = tmp_path_factory.mktemp("random") / "step"
    sx.export(sx.capture(drawing(torch.float32), batch(6, torch.float32)), path)
    return path


def changed(artifact: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the artifact whose manifest's ``random_numbers`` are changed."""
    shutil.copytree(artifact, folder / "step")
    path = folder / "step" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest["details"]["random_numbers"])
    path.write_text(json.dumps(manifest))
    return folder / "step"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generator": "threefry"}, "generator 'threefry'"),
        ({"inputs": {"step": [{"input": "random_words.0"}]}}, "malformed"),
        ({"inputs": {}}, "inputs of .*step.onnx are not those of the contract: random_mask"),
    ],
    ids=["another generator", "a field is missing", "no inputs"],
)
def test_a_manifest_that_lies_is_refused(
    artifact: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = changed(artifact, tmp_path, lambda numbers: numbers.update(change))
    with pytest.raises(sx.ArtifactError, match=message):
        sx.load(path)


@pytest.mark.parametrize("size", ["batch*", "open('x')", "other", "batch**batch", 1.5])
def test_a_size_that_cannot_be_computed_is_refused(
    artifact: Path, tmp_path: Path, size: Any
) -> None:
    def change(numbers: dict[str, Any]) -> None:
        numbers["inputs"]["step"][0]["size"][0] = size

    path = changed(artifact, tmp_path, change)
    with pytest.raises(sx.ArtifactError, match=r"size .* in the manifest|contract says"):
        sx.load(path).step(*batch(6, torch.float32))
