"""`Session.export_model`: the trained model alone, as any runtime of its form loads it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import sam_export as sx
from sam_export.errors import ArtifactError, SessionError
from sam_export.runtime import model_file
from sam_export.runtime.session import Session
from tests.runtime.target_cases import images, make

ort = pytest.importorskip("onnxruntime")

ONNX_TARGETS = ["onnx", "onnx-training", "ort-artifacts"]
SUFFIX = {"torchscript": ".pt", "torch-compile": ".pt2"}
TARGETS = [*ONNX_TARGETS, *SUFFIX]

LARGEST_SUM = 24
"""Terms of the longest sum in the small model: its rounding is about as many eps of the result."""

Array = NDArray[Any]


class Several(nn.Module):
    """Named inputs, one of which nothing reads; nested outputs; a constant; dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.offset = torch.arange(4.0)

    def forward(self, left: Tensor, weight: Tensor, unread: Tensor) -> dict[str, Any]:
        hidden = self.dropout(self.norm(self.first(left))) * weight[:, None] + self.offset
        return {"logits": hidden, "pair": (hidden.sum(1), None, self.first.bias * 2)}


def loss_of_several(outputs: dict[str, Any], label: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs["logits"], label)


def named(count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "left": torch.randn(count, 3, generator=generator),
        "weight": torch.rand(count, generator=generator),
        "unread": torch.rand(count, 2, generator=generator),
    }


def file_name(target: str) -> str:
    return "served/model" + SUFFIX.get(target, ".onnx")


def run_onnx(path: Path, feed: dict[str, Tensor]) -> dict[str, Array]:
    """What onnxruntime computes, without any option."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    results = session.run(None, {name: value.numpy() for name, value in feed.items()})
    return dict(zip(names, results, strict=True))


def trained(target: str, dtype: torch.dtype) -> tuple[Session, nn.Module, nn.Module]:
    """A session after steps on batches far from the origin, its model in eager, and the first."""
    step = make(dtype, "sgd")
    first = make(dtype, "sgd").model.eval()
    session = sx.load(sx.capture(step, images(5, dtype)), target=target, threads=1)
    for seed in range(4):
        x, y = images(6, dtype, seed)
        session.step(3 * x + 2, y)
    session.load_into(step)
    return session, step.model.eval(), first


def bound(reference: Array) -> float:
    return LARGEST_SUM * float(np.finfo(reference.dtype).eps) * float(np.abs(reference).max())


def compared(found: Any, model: nn.Module, first: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected, untrained = model(x).numpy(), first(x).numpy()
    found = np.asarray(found)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound(expected))
    assert np.abs(expected - untrained).max() > 0.1  # so that old weights would be seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("target", ONNX_TARGETS)
def test_onnxruntime_computes_what_eager_does(
    target: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    if target == "ort-artifacts" and dtype == torch.float64:
        pytest.skip("ort-artifacts is float32 only")
    session, model, first = trained(target, dtype)
    path = tmp_path / file_name(target)
    session.export_model(path)
    session.step(*images(6, dtype))  # what is written does not change with the session
    for count in (1, 5, 11):
        x, _ = images(count, dtype, seed=9)
        compared(run_onnx(path, {"x": x})["output"], model, first, x)
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path).graph
    (x_info,), (output_info,) = graph.input, graph.output
    assert [x_info.name, output_info.name] == ["x", "output"]
    sizes = [dim.dim_param or dim.dim_value for dim in x_info.type.tensor_type.shape.dim]
    assert sizes == ["batch", 1, 4, 4]
    held = {tensor.name for tensor in graph.initializer}
    assert held >= {"conv.weight", "norm.running_mean", "norm.running_var", "scale", "head.bias"}
    # Nothing needs it in eval mode; ort-artifacts casts it all the same.
    assert target == "ort-artifacts" or "norm.num_batches_tracked" not in held
    assert [item.name for item in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("target", list(SUFFIX))
def test_torch_computes_what_eager_does(target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    session, model, first = trained(target, dtype)
    path = tmp_path / file_name(target)
    session.export_model(path)
    session.step(*images(6, dtype))
    served = loaded(path)
    for count in (1, 5, 11):
        x, _ = images(count, dtype, seed=9)
        with torch.no_grad():
            compared(served(x), model, first, x)
    for name, value in model.state_dict().items():
        assert torch.equal(served.state_dict()[name], value), name


def loaded(path: Path) -> Any:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        return torch.jit.load(str(path))


@pytest.mark.parametrize("target", TARGETS)
def test_named_inputs_and_several_outputs(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Several()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    step = sx.TrainStep(model, loss_of_several, sam)
    batch = {**named(6), "label": torch.randint(0, 4, (6,))}
    session = sx.load(sx.capture(step, batch), target=target, threads=1)
    session.step(batch)
    path = tmp_path / file_name(target)
    session.export_model(path)
    session.load_into(step)
    model.eval()
    given = named(9, seed=1)
    if target == "torch-compile":
        assert loaded(path)(**given)["pair"][1] is None
        pair = loaded(path)(**given)
        found = {"logits": pair["logits"], "pair.0": pair["pair"][0], "pair.2": pair["pair"][2]}
    elif target == "torchscript":
        found = loaded(path)(*given.values())
    else:
        found = {
            name.removeprefix("output."): value
            for name, value in run_onnx(
                path, {name: given[name] for name in ("left", "weight")}
            ).items()
        }
        assert [item.name for item in onnx.load(path).graph.input] == ["left", "weight"]
    assert list(found) == ["logits", "pair.0", "pair.2"]
    with torch.no_grad():
        outputs = model(**given)
    for name, value in (
        ("logits", outputs["logits"]),
        ("pair.0", outputs["pair"][0]),
        ("pair.2", outputs["pair"][2]),
    ):
        expected = value.detach().numpy()
        array = found[name].detach() if isinstance(found[name], Tensor) else found[name]
        np.testing.assert_allclose(
            np.asarray(array), expected, rtol=0, atol=bound(expected), err_msg=name
        )


@pytest.mark.parametrize("target", ["onnx", "torchscript"])
def test_the_averaged_weights(target: str, tmp_path: Path) -> None:
    def made() -> sx.TrainStep:
        plain = make(torch.float32, "sgd")
        ema = sx.EMA(0.9)
        return sx.TrainStep(plain.model, nn.CrossEntropyLoss(), plain.optimizer, ema=ema)

    step = made()
    session = sx.load(sx.capture(step, images(5, torch.float32)), target=target, threads=1)
    for seed in range(4):
        session.step(*images(6, torch.float32, seed))
    path = tmp_path / file_name(target)
    session.export_model(path, average=True)
    model = make(torch.float32, "sgd").model.eval()
    state = session.state
    names = {n: f"average.{n}" if f"average.{n}" in state else n for n in model.state_dict()}
    assert any(name.startswith("average.") for name in names.values())
    model.load_state_dict({n: torch.from_numpy(state[at]) for n, at in names.items()})
    x, _ = images(7, torch.float32, seed=9)
    found = run_onnx(path, {"x": x})["output"] if target == "onnx" else loaded(path)(x).numpy()
    with torch.no_grad():
        expected = model(x).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound(expected))
    assert np.abs(found - session.evaluate(x)).max() > 100 * bound(expected)


def test_averaged_weights_that_there_are_not(session: Session, tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="No program 'evaluate_average'"):
        session.export_model(tmp_path / "model.onnx", average=True)
    assert not list(tmp_path.iterdir())


def test_a_scripted_model_checks_what_it_is_given(tmp_path: Path) -> None:
    session, _, _ = trained("torchscript", torch.float32)
    session.export_model(tmp_path / "model.pt")
    served = loaded(tmp_path / "model.pt")
    with pytest.raises(Exception, match="batch tensor 'x' is float64.*expected float32"):
        served(images(3, torch.float64)[0])
    assert not served.training
    assert not any(parameter.requires_grad for parameter in served.parameters())


SERVE = """
import sys, warnings
import torch
warnings.simplefilter("ignore")
script, program = sys.argv[1:]
x = torch.ones(7, 1, 4, 4)
one, other = torch.jit.load(script)(x), torch.export.load(program).module()(x)
assert (one - other).abs().max() < 1e-5
assert not [name for name in sys.modules if name.startswith("sam_export")]
"""


def test_torch_alone_serves_them(tmp_path: Path) -> None:
    for target, suffix in SUFFIX.items():
        session, _, _ = trained(target, torch.float32)
        session.export_model(tmp_path / f"model{suffix}")
    files = [str(tmp_path / f"model{suffix}") for suffix in SUFFIX.values()]
    done = subprocess.run(
        [sys.executable, "-c", SERVE, *files], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


# -- what cannot be done ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session() -> Session:
    """A session of target ``onnx``."""
    return trained("onnx", torch.float32)[0]


@pytest.mark.parametrize(
    ("target", "name", "message"),
    [
        ("onnx", "model.pt", r"writes a model as a \.onnx file.*exported to 'torchscript'"),
        ("onnx", "model", r"writes a model as a \.onnx file. Give a name that ends in \.onnx\."),
        ("torchscript", "m.onnx", r"as a \.pt file.*'onnx' or 'onnx-training' or 'ort-artifacts'"),
        ("torch-compile", "m.pt", r"as a \.pt2 file.*exported to 'torchscript'"),
        ("aot-inductor", "m.pt2", r"cannot write a model.*exported to 'torch-compile'"),
    ],
)
def test_another_form_is_refused_with_the_way_to_it(target: str, name: str, message: str) -> None:
    with pytest.raises(SessionError, match=message):
        model_file.check_path(target, Path(name))


def test_a_wrong_name_writes_nothing(session: Session, tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="ends in"):
        session.export_model(tmp_path / "new" / "model.txt")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ArtifactError, match="is a folder"):
        session.export_model(tmp_path / "folder.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


@pytest.mark.parametrize("target", ["onnx", "torchscript"])
def test_a_model_that_draws_in_eval_mode_is_refused(target: str, tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.linear(x), 0.5, training=True)

    model = Noisy()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam)
    batch = torch.randn(4, 3), torch.randint(0, 3, (4,))
    session = sx.load(sx.capture(step, batch), target=target, threads=1)
    with pytest.raises(SessionError, match="draws random numbers in eval mode"):
        session.export_model(tmp_path / file_name(target))
    assert not list(tmp_path.iterdir())


def test_a_changed_artifact_is_refused(tmp_path: Path) -> None:
    step = make(torch.float32, "sgd")
    artifact = sx.export(sx.capture(step, images(5, torch.float32)), tmp_path / "artifact")
    session = sx.load(tmp_path / "artifact", threads=1)
    artifact.file("evaluate").write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"evaluate\.onnx has changed since"):
        session.export_model(tmp_path / "model.onnx")
    artifact.file("evaluate").unlink()
    with pytest.raises(ArtifactError, match="cannot be read any more"):
        session.export_model(tmp_path / "model.onnx")


def test_a_scripted_artifact_of_an_older_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sam_export._compat import torchscript

    session, _, _ = trained("torchscript", torch.float32)
    monkeypatch.setattr(torchscript, "SERVING", "something.else")
    with pytest.raises(ArtifactError, match="Export the step again"):
        session.export_model(tmp_path / "model.pt")


def test_a_model_that_onnxruntime_does_not_load_is_not_written(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    session.export_model(path)
    before = path.read_bytes()

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(SessionError, match="does not load the model.*no kernel"):
        session.export_model(path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("target", ["onnx", "torchscript", "torch-compile"])
def test_a_full_disk_leaves_the_old_model_and_nothing_else(
    target: str, tmp_path: Path, failing_disk: Callable[[], None]
) -> None:
    session, _, _ = trained(target, torch.float32)
    path = tmp_path / ("model" + SUFFIX.get(target, ".onnx"))
    session.export_model(path)
    before = path.read_bytes()
    session.step(*images(6, torch.float32))
    failing_disk()
    with pytest.raises(ArtifactError, match="No space left on device.*still whole"):
        session.export_model(path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_another_file_of_that_name_is_no_obstacle(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for content in (b"", b"notes", b"\x3a\xff\xff\xff"):
        path.write_bytes(content)
        session.export_model(path)
        onnx.checker.check_model(path)
