"""The C++ programs of ``examples/cpp``: built, run, and compared with Python bit for bit."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import sam_export as sx
from models import digits_cnn
from models.digits import load_digits

SOURCE = Path(__file__).parents[2] / "examples" / "cpp"
EPOCHS, BATCH_SIZE, LR = 3, 64, 0.03

pytestmark = pytest.mark.cpp


def missing_tool() -> str | None:
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if importlib.util.find_spec("nlohmann_json") is None:
        return "the package nlohmann_json is not installed"
    return None


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both programs, built as the guide says."""
    reason = missing_tool()
    if reason is not None:
        pytest.skip(f"the C++ programs cannot be built: {reason}")
    import nlohmann_json

    build = tmp_path_factory.mktemp("cpp")
    includes = Path(nlohmann_json.__file__).parent / "include"
    configure = ["cmake", "-S", str(SOURCE), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    configure += [f"-DNLOHMANN_JSON_INCLUDE={includes}"]
    for command in (configure, ["cmake", "--build", str(build), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning:" not in done.stdout + done.stderr
    return build


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of both targets, with dropout in the model, and the digits."""
    folder = tmp_path_factory.mktemp("digits")
    step, batches = digits_cnn.recipe(batch_size=BATCH_SIZE, dropout=0.2)
    captured = sx.capture(step, batches[0])
    for target in ("torchscript", "aot-inductor"):
        sx.export(captured, folder / target, target=target)
    digits = load_digits()
    arrays = {name: getattr(digits, name) for name in ("train_x", "train_y", "test_x", "test_y")}
    save_file(arrays, folder / "digits.safetensors")
    return folder


def run(program: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    given = {"epochs": EPOCHS, "batch-size": BATCH_SIZE, "lr": LR, "threads": 1, **options}
    words = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    return subprocess.run([str(program), *words], capture_output=True, text=True)


def scripted(programs: Path, workplace: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    given = {"step": workplace / "torchscript" / "step.pt", **options}
    given.setdefault("data", workplace / "digits.safetensors")
    return run(programs / "train_torchscript", **given)


def compiled(programs: Path, workplace: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    given = {"artifact": workplace / "aot-inductor", **options}
    given.setdefault("data", workplace / "digits.safetensors")
    return run(programs / "train_aot_inductor", **given)


def batches_of(epoch: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """The batches of one epoch in the order of `order_of` in ``training.h``."""
    digits = load_digits()
    order = np.arange(len(digits.train_y))
    generator = np.random.MT19937()
    generator._legacy_seeding(epoch)  # type: ignore[attr-defined]  # as std::mt19937(epoch) does
    for i in range(len(order) - 1, 0, -1):
        j = int(generator.random_raw()) % (i + 1)
        order[i], order[j] = order[j], order[i]
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        yield digits.train_x[chosen], digits.train_y[chosen]


def trained_in_python(artifact: Path) -> tuple[dict[str, NDArray[Any]], list[float]]:
    """The state after the same training by a `Session`, and the mean loss of each epoch."""
    threads = torch.get_num_threads()
    session = sx.load(artifact, threads=1)
    means = []
    steps = sum(1 for _ in batches_of(0))
    for epoch in range(EPOCHS):
        losses = []
        for index, (x, y) in enumerate(batches_of(epoch)):
            done = (epoch * steps + index) / (EPOCHS * steps)
            lr = LR * 0.5 * (1 + math.cos(math.pi * done))
            losses.append(float(session.step(x, y, lr=lr).loss))
        means.append(sum(losses) / len(losses))
    torch.set_num_threads(threads)
    assert session.state["counter.step"] == EPOCHS * steps  # it draws, and counts
    return session.state, means


def assert_same_bits(found: dict[str, Any], expected: dict[str, NDArray[Any]]) -> None:
    for name, value in expected.items():
        array = np.asarray(found[name])
        assert (array.dtype, array.shape) == (value.dtype, value.shape), name
        assert array.tobytes() == value.tobytes(), name


def losses_in(text: str) -> list[float]:
    return [
        float(line.split("loss ")[1].split(",")[0])
        for line in text.splitlines()
        if line.startswith("epoch")
    ]


def last_accuracy(text: str) -> float:
    (*_, line) = [line for line in text.splitlines() if "accuracy" in line]
    return float(line.split("accuracy ")[1].split()[0])


def test_scripted_step_trains_in_cpp_as_in_python(
    programs: Path, workplace: Path, tmp_path: Path
) -> None:
    whole = scripted(programs, workplace, out=tmp_path / "whole.pt")
    assert whole.returncode == 0, whole.stderr
    state, losses = trained_in_python(workplace / "torchscript")
    assert losses_in(whole.stdout) == pytest.approx(losses, abs=1e-6)
    assert last_accuracy(whole.stdout) > 97

    # Stopped after one epoch, and gone on with in another process.
    options = {"out": tmp_path / "part.pt", "stop-after": 1}
    assert scripted(programs, workplace, **options).returncode == 0
    rest = scripted(programs, workplace, step=tmp_path / "part.pt", out=tmp_path / "rest.pt")
    assert rest.stdout.startswith("epoch 2/3")

    for name in ("whole.pt", "rest.pt"):
        with pytest.warns(DeprecationWarning, match="torch.jit.load"):
            module = torch.jit.load(str(tmp_path / name))
        held = {key: value.numpy() for key, value in module.state_dict().items()}
        assert_same_bits(held, state)


def test_compiled_step_trains_in_cpp_as_in_python(
    programs: Path, workplace: Path, tmp_path: Path
) -> None:
    whole = compiled(programs, workplace, out=tmp_path / "whole.safetensors")
    assert whole.returncode == 0, whole.stderr
    state, losses = trained_in_python(workplace / "aot-inductor")
    assert losses_in(whole.stdout) == pytest.approx(losses, abs=1e-6)
    assert last_accuracy(whole.stdout) > 97

    options = {"out": tmp_path / "part.safetensors", "stop-after": 1}
    assert compiled(programs, workplace, **options).returncode == 0
    options = {"out": tmp_path / "rest.safetensors", "restart": tmp_path / "part.safetensors"}
    assert compiled(programs, workplace, **options).stdout.startswith("epoch 2/3")

    for name in ("whole.safetensors", "rest.safetensors"):
        assert_same_bits(load_file(tmp_path / name), state)
        session = sx.load(workplace / "torchscript")  # a checkpoint is for every target
        session.restore(tmp_path / name)
        assert session.step_count == EPOCHS * sum(1 for _ in batches_of(0))
        assert_same_bits(session.state, state)


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("error: ")
    for part in parts:
        assert part in done.stderr


def test_data_of_a_wrong_shape_is_refused(programs: Path, workplace: Path, tmp_path: Path) -> None:
    arrays = load_file(workplace / "digits.safetensors")
    data = tmp_path / "data.safetensors"
    for wrong, found in (
        ({**arrays, "train_x": np.zeros((300, 1, 9, 8), np.float32)}, "[64, 1, 9, 8]"),
        ({**arrays, "train_x": arrays["train_x"].astype(np.float64)}, "[64, 1, 8, 8]"),
    ):
        save_file(wrong, data)
        for program in (scripted, compiled):
            done = program(programs, workplace, data=data, out=tmp_path / "out")
            assert_refused(done, "batch tensor 'x'", found, "expected float32[")
    save_file({**arrays, "train_y": arrays["train_y"][:70]}, data)
    for program in (scripted, compiled):
        assert program(programs, workplace, data=data, out=tmp_path / "out").returncode == 1
    save_file({"train_x": arrays["train_x"]}, data)
    for program in (scripted, compiled):
        done = program(programs, workplace, data=data, out=tmp_path / "out")
        assert_refused(done, "there is no tensor 'train_y'")
    assert [path.name for path in tmp_path.iterdir()] == ["data.safetensors"]


@pytest.mark.parametrize("kept", [0, 4, 1000, -2])
def test_a_file_that_is_cut_off_is_refused(
    programs: Path, workplace: Path, tmp_path: Path, kept: int
) -> None:
    def cut(path: Path) -> Path:
        (tmp_path / path.name).write_bytes(path.read_bytes()[:kept])
        return tmp_path / path.name

    step = cut(workplace / "torchscript" / "step.pt")
    assert_refused(scripted(programs, workplace, step=step, out=tmp_path / "out"))
    data = cut(workplace / "digits.safetensors")
    for program in (scripted, compiled):
        done = program(programs, workplace, data=data, out=tmp_path / "out")
        assert_refused(done, "digits.safetensors", "cut off")
    for name in ("manifest.json", "state.safetensors", "step.pt2"):
        shutil.copytree(workplace / "aot-inductor", tmp_path / name[:5])
        cut(workplace / "aot-inductor" / name).replace(tmp_path / name[:5] / name)
        done = compiled(programs, workplace, artifact=tmp_path / name[:5], out=tmp_path / "out")
        assert_refused(done, "cut off" if name != "manifest.json" else "damaged")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("instruction_set", ["avx1024"], "this CPU lacks avx1024"),
        ("architecture", "sparc64", 'architecture "sparc64", here it is'),
        ("system", "Plan9", 'system "Plan9", here it is'),
        ("torch", "1.0.0", 'torch "1.0.0", here it is'),
    ],
)
def test_an_artifact_of_another_machine_is_refused(
    programs: Path, workplace: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    shutil.copytree(workplace / "aot-inductor", tmp_path / "foreign")
    path = tmp_path / "foreign" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["details"]["machine"][key] = value
    path.write_text(json.dumps(manifest))
    done = compiled(programs, workplace, artifact=tmp_path / "foreign", out=tmp_path / "out")
    assert_refused(done, "another machine", message)
    with pytest.raises(sx.RuntimeUnavailableError, match="cannot run on this machine"):
        sx.load(tmp_path / "foreign")


def test_wrong_options_are_refused(programs: Path, workplace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_refused(scripted(programs, workplace, out=out, speed=9), "unknown option --speed")
    assert_refused(scripted(programs, workplace, step="none.pt", out=out), "none.pt")
    assert_refused(compiled(programs, workplace, artifact="none", out=out), "manifest.json")
    assert_refused(compiled(programs, workplace), "--out is missing")
    for text in ("many", "3x", "-1", ""):
        done = scripted(programs, workplace, out=out, epochs=text)
        assert_refused(done, f"--epochs {text}: expected a number")
    onnx_like = tmp_path / "other"
    shutil.copytree(workplace / "torchscript", onnx_like)
    assert_refused(compiled(programs, workplace, artifact=onnx_like, out=out), "torchscript")
    assert_refused(
        compiled(programs, workplace, out=tmp_path / "no" / "such" / "folder"), "cannot be written"
    )
