"""What `sam_export.runtime.detect` finds, against fake installations on the import path."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

from sam_export.errors import RuntimeUnavailableError
from sam_export.runtime import detect


def install(site: Path, name: str, version: str) -> None:
    """Makes the metadata that pip would make for a package."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An import path where nothing is installed; returns its folder."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr(sys, "path", [str(site)])
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    return site


def use_module(monkeypatch: pytest.MonkeyPatch, providers: list[str]) -> None:
    """Puts a module named onnxruntime in place that has these providers."""
    module = types.ModuleType("onnxruntime")
    module.InferenceSession = object  # type: ignore[attr-defined]
    module.get_available_providers = lambda: providers  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime", module)


def test_this_machine() -> None:
    runtime = pytest.importorskip("onnxruntime")
    assert detect.require_onnxruntime() is runtime
    assert detect.require_provider("cpu") == ["CPUExecutionProvider"]
    (version,) = detect.onnxruntime_distributions().values()
    assert version == runtime.__version__


def test_onnxruntime_does_not_bring_torch() -> None:
    pytest.importorskip("onnxruntime")
    code = (
        "import sys; from sam_export.runtime.detect import require_onnxruntime\n"
        "version = require_onnxruntime().__version__\n"
        "assert not {'torch', 'onnx'} & set(sys.modules)\n"
        "import importlib.util\n"
        "if importlib.util.find_spec('torch') and importlib.util.find_spec('onnxruntime.training'):"
        "\n    from onnxruntime.training import artifacts\n"
        "print(version)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert (done.stdout.strip(), done.returncode) == (
        *detect.onnxruntime_distributions().values(),
        0,
    ), done.stderr


def test_none_installed(bare: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"none is installed.*pip install .*\[ort\]"):
        detect.require_onnxruntime()
    assert not list(bare.iterdir())
    status = detect.target_status("onnx")
    assert [missing.what for missing in status.run] == ["ONNX Runtime"]
    assert [missing.what for missing in status.export] == [
        "torch >= 2.11",
        "onnx >= 1.16",
        "onnxscript >= 0.7",
    ]


def test_two_installed(bare: Path) -> None:
    install(bare, "onnxruntime", "1.20.0")
    install(bare, "onnxruntime-training-cpu", "1.19.2")
    with pytest.raises(RuntimeUnavailableError) as caught:
        detect.require_onnxruntime()
    message = str(caught.value)
    assert "onnxruntime 1.20.0, onnxruntime-training-cpu 1.19.2" in message
    assert "pip uninstall -y onnxruntime onnxruntime-training-cpu" in message
    (missing,) = detect.target_status("onnx").run
    assert "instead of 2" in missing.what
    assert "pip uninstall -y onnxruntime onnxruntime-training-cpu" in missing.install
    problems = {runtime.name: runtime.problem for runtime in detect.machine_status().runtimes}
    assert problems["onnxruntime"] is not None
    assert problems["torch"] is None


def test_remains_of_an_uninstalled_package(bare: Path) -> None:
    (bare / "onnxruntime").mkdir()
    with pytest.raises(RuntimeUnavailableError, match="remains of an uninstalled package"):
        detect.require_onnxruntime()
    (runtime,) = detect.machine_status().runtimes[3:]
    assert runtime.version is None
    assert "Remove that folder" in str(runtime.problem)


def test_package_that_lost_its_files_to_another_one(bare: Path) -> None:
    (bare / "onnxruntime").mkdir()
    install(bare, "onnxruntime-gpu", "1.31.1")
    again = "pip install --force-reinstall --no-deps onnxruntime-gpu==1.31.1"
    with pytest.raises(RuntimeUnavailableError, match=f"onnxruntime-gpu 1.31.1 went.*{again}"):
        detect.require_onnxruntime()
    (missing,) = detect.target_status("onnx").run
    assert (missing.what, missing.install) == (
        "an ONNX Runtime that can be loaded (onnxruntime-gpu 1.31.1 cannot)",
        again,
    )


def test_package_that_cannot_be_loaded(bare: Path) -> None:
    install(bare, "onnxruntime", "1.20.0")
    (bare / "onnxruntime").mkdir()
    (bare / "onnxruntime" / "__init__.py").write_text("raise ImportError('libfoo.so.1 not found')")
    with pytest.raises(RuntimeUnavailableError, match=r"onnxruntime 1\.20\.0.*libfoo\.so\.1"):
        detect.require_onnxruntime()


def test_missing_dependency_is_not_called_a_missing_runtime(bare: Path) -> None:
    (bare / "onnxruntime.py").write_text("import flatbuffers_of_another_planet")
    with pytest.raises(RuntimeUnavailableError, match="flatbuffers_of_another_planet"):
        detect.require_onnxruntime()


def test_old_torch(bare: Path) -> None:
    install(bare, "torch", "2.9.1+cpu")
    whats = [missing.what for missing in detect.target_status("torch-compile").export]
    assert whats == ["torch >= 2.11 (found 2.9.1+cpu)"]


def test_new_torch_needs_a_compiler(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(bare, "torch", "2.11.0+cpu")
    monkeypatch.setenv("CXX", "no-such-compiler --fast")
    status = detect.target_status("torch-compile")
    assert status.export == ()
    assert [missing.what for missing in status.run] == ["a C++ compiler (no-such-compiler --fast)"]


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_present(device: str, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(bare, "onnxruntime-gpu", "1.20.0")
    use_module(
        monkeypatch,
        ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    assert detect.require_provider(device) == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert detect.require_provider("cpu") == ["CPUExecutionProvider"]


def test_cuda_absent(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(bare, "onnxruntime-training-cpu", "1.19.2")
    use_module(monkeypatch, ["AzureExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailableError) as caught:
        detect.require_provider("cuda:1")
    message = str(caught.value)
    assert "'cuda:1' needs CUDAExecutionProvider" in message
    assert "onnxruntime-training-cpu 1.19.2" in message
    assert "has only AzureExecutionProvider, CPUExecutionProvider" in message
    assert message.endswith(
        "pip uninstall -y onnxruntime-training-cpu && "
        'pip install "sam_export[ort-training-gpu]" in Python 3.11, '
        'or for the target onnx pip install "sam_export[ort-gpu]".'
    )


def test_cuda_absent_from_a_build_for_inference(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(bare, "onnxruntime", "1.32.0")
    use_module(monkeypatch, ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailableError) as caught:
        detect.require_provider("cuda")
    assert str(caught.value).endswith(
        'pip uninstall -y onnxruntime && pip install "sam_export[ort-gpu]".'
    )


@pytest.mark.parametrize(
    ("problem", "number"), [("it cannot load libcudnn.so.9", 0), ("there is no GPU 1", 1)]
)
def test_cuda_that_cannot_start(
    problem: str, number: int, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(bare, "onnxruntime-gpu", "1.31.1")
    use_module(monkeypatch, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(
        detect, "cuda_problem", lambda module, n=0: problem if n == number else None
    )
    with pytest.raises(RuntimeUnavailableError) as caught:
        detect.require_provider(f"cuda:{number}")
    assert "CUDAExecutionProvider, which cannot start here: " + problem in str(caught.value)
    assert detect.require_provider("cpu") == ["CPUExecutionProvider"]
    (runtime,) = detect.machine_status().runtimes[3:]
    assert runtime.cuda_problem == (problem if number == 0 else None)
    assert runtime.problem is None
    assert detect.target_status("onnx").run == ()


@pytest.mark.parametrize(
    ("packages", "version", "advice"),
    [
        ((), (3, 11), 'pip install "sam_export[ort-training]"'),
        ((), (3, 13), 'pip install "sam_export[ort-training]" in Python 3.12; there is none for'),
        (
            ("onnxruntime", "onnxruntime-gpu"),
            (3, 11),
            "pip uninstall -y onnxruntime onnxruntime-gpu && "
            'pip install "sam_export[ort-training-gpu]"',
        ),
        (
            ("onnxruntime-gpu",),
            (3, 12),
            "pip uninstall -y onnxruntime-gpu && "
            'pip install "sam_export[ort-training-gpu]" in Python 3.11; there is none for 3.12',
        ),
    ],
)
def test_advice_for_a_training_build(
    packages: tuple[str, ...],
    version: tuple[int, int],
    advice: str,
    bare: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in packages:
        install(bare, package, "1.31.1")
    monkeypatch.setattr(sys, "version_info", (*version, 0))
    (missing,) = detect.target_status("onnx-training").run
    assert missing.what.startswith("a training build of ONNX Runtime")
    assert ("instead of 2" in missing.what) is (len(packages) == 2)
    assert missing.install.startswith(advice)


@pytest.mark.parametrize("device", ["gpu", "cuda1", "cuda:", "cpu:0", "", "CUDA"])
def test_unknown_device(device: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match="expected 'cpu', 'cuda' or"):
        detect.parse_device(device)


def test_device_numbers() -> None:
    assert detect.parse_device("cpu") == ("cpu", 0)
    assert detect.parse_device("cuda") == ("cuda", 0)
    assert detect.parse_device("cuda:3") == ("cuda", 3)


def test_unknown_target() -> None:
    with pytest.raises(RuntimeUnavailableError, match="torchscript, aot-inductor, onnx"):
        detect.target_status("tensorflow")
