"""Where torch is not installed, artifacts of ONNX files train to the very same weights."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sam_export
from sam_export.artifact.state_file import read_state
from sam_export.runtime.detect import target_status

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("sam_export", "pyproject.toml", "README.md", "LICENSE")
STEPS = 5

torch = pytest.importorskip("torch")
onnxruntime = pytest.importorskip("onnxruntime")

TRAIN = """
import importlib.util
import sys

import numpy as np

import sam_export
from sam_export.artifact.state_file import write_state
from pathlib import Path

assert importlib.util.find_spec("torch") is None
artifact, data, steps, out = sys.argv[1:]
session = sam_export.load(artifact, threads=1)
with np.load(data) as file:
    for index in range(int(steps)):
        result = session.step(file[f"x{index}"], file[f"y{index}"], lr=0.1 / (index + 1))
assert bool(result.finite)
session.save(Path(out) / "run.ckpt")
session.restore(Path(out) / "run.ckpt")
write_state(Path(out) / "state.safetensors", session.state)
session.export_model(Path(out) / "model.onnx")
assert not {"torch", "onnx"} & set(sys.modules)
try:
    sam_export.capture
except sam_export.RuntimeUnavailableError as error:
    assert "sam_export[export]" in str(error)
else:
    raise AssertionError("capture is there without torch")
"""


@dataclass(frozen=True)
class Trained:
    """An artifact, batches for it, and where this process's session gets with them."""

    artifact: Path
    data: Path
    state: dict[str, NDArray[Any]]


@pytest.fixture(scope="session", params=["onnx", "onnx-training", "ort-artifacts"])
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Trained:
    """A small MLP as an artifact, trained in this process."""
    target: str = request.param
    if target != "onnx" and target_status(target).run:
        pytest.skip("needs a training build of ONNX Runtime")
    folder = tmp_path_factory.mktemp("with_torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    optimizer = sam_export.SAM(model.parameters(), torch.optim.AdamW, lr=0.1, weight_decay=0.01)
    step = sam_export.TrainStep(model, torch.nn.CrossEntropyLoss(), optimizer)
    generator = np.random.default_rng(0)
    arrays = {}
    for index in range(STEPS):
        arrays[f"x{index}"] = generator.standard_normal((8 - index, 6)).astype(np.float32)
        arrays[f"y{index}"] = generator.integers(0, 3, 8 - index)
    np.savez(folder / "data.npz", **arrays)
    example = (torch.from_numpy(arrays["x0"]), torch.from_numpy(arrays["y0"]))
    sam_export.export(sam_export.capture(step, example), folder / "artifact", target=target)

    session = sam_export.load(folder / "artifact", threads=1)
    for index in range(STEPS):
        session.step(arrays[f"x{index}"], arrays[f"y{index}"], lr=0.1 / (index + 1))
    return Trained(folder / "artifact", folder / "data.npz", session.state)


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of an environment with NumPy, safetensors, ONNX Runtime and this package's wheel.

    The tests are skipped where pip cannot install the three packages; a wheel that cannot be built
    or installed is a failure.
    """
    folder = tmp_path_factory.mktemp("without_torch")
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:  # a copy, since the build leaves files beside its sources
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    _run([*pip, *build])
    (wheel,) = folder.glob("sam_export-*.whl")

    _run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")])
    (python,) = [*folder.glob("venv/bin/python"), *folder.glob("venv/Scripts/python.exe")]
    into = [*pip, "--python", str(python), "install"]
    packages = [_as_here("numpy"), _as_here("safetensors"), _installed_onnxruntime()]
    installed = subprocess.run(
        [*into, "-c", str(ROOT / "constraints.txt"), *packages],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if installed.returncode != 0:
        pytest.skip(f"pip cannot install {', '.join(packages)}: {installed.stderr[-300:]}")
    _run([*into, "--no-deps", str(wheel)])
    return python


def _as_here(distribution: str) -> str:
    return f"{distribution}=={importlib.metadata.version(distribution)}"


def _installed_onnxruntime() -> str:
    """The ONNX Runtime of this environment: another one may compute other bits."""
    from sam_export.runtime.detect import onnxruntime_distributions

    (name,) = onnxruntime_distributions()
    return _as_here(name)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_same_weights_bit_for_bit(bare_python: Path, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    command = [bare_python, "-I", tmp_path / "train.py", trained.artifact, trained.data, STEPS]
    _run([*map(str, command), str(tmp_path)])
    state = read_state(tmp_path / "state.safetensors")
    assert sorted(state) == sorted(trained.state)
    for name, value in trained.state.items():
        assert state[name].dtype == value.dtype, name
        assert state[name].tobytes() == value.tobytes(), name
    served = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(2).standard_normal((3, 6)).astype(np.float32)
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    w1, b1, w2, b2 = (state[name].astype(np.float64) for name in names)
    expected = np.tanh(x @ w1.T + b1) @ w2.T + b2
    (found,) = served.run(None, {served.get_inputs()[0].name: x})
    # Sums of 6 and of 16 terms, each rounded.
    bound = 22 * 2.0**-23 * float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


def test_command_line(bare_python: Path, trained: Trained, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    x = generator.standard_normal((40, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x, x[:, :3].argmax(axis=1))
    command = [str(bare_python), "-I", "-m", "sam_export"]
    data = str(tmp_path / "data.npz")
    argv = ["train", str(trained.artifact), "--data", data, "--validate", data, "--epochs", "2"]
    text = _run([*command, *argv, "--checkpoint", str(tmp_path / "run.ckpt")])
    assert "epoch 2/2  loss " in text
    assert "accuracy " in text
    assert "parameter" in _run([*command, "inspect", str(trained.artifact)])
    status = json.loads(_run([*command, "targets", "--json"]))
    missing = {target["target"]: target for target in status["targets"]}
    assert missing["onnx"]["run"] == []
    assert missing["onnx"]["export"]
    assert missing["torch-compile"]["run"]
    refused = subprocess.run(
        [*command, "export", "recipe.py:recipe", "--out", str(tmp_path / "artifact")],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert "Exporting to onnx needs torch >= 2.11" in refused.stderr
    assert 'Install: pip install "sam_export[export]".' in refused.stderr
