"""The CUDA provider's libraries: read from real ELF files, found in packages, or named."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import types
import uuid
from pathlib import Path

import pytest

from sam_export.runtime import cuda_libraries
from sam_export.runtime.cuda_libraries import (
    DRIVER,
    PROVIDER,
    CudaLibraries,
    cuda_problem,
    load_libraries,
    needed_libraries,
    nvidia_gpus,
    package_of,
)

LINUX = sys.platform.startswith("linux")
needs_linux = pytest.mark.skipif(not LINUX, reason="ELF files are those of Linux")
needs_gcc = pytest.mark.skipif(
    not LINUX or shutil.which("gcc") is None, reason="needs gcc to build small libraries"
)


def built(folder: Path, name: str, *, uses: tuple[Path, ...] = ()) -> Path:
    """A shared library that is called ``name`` and needs the libraries ``uses``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    source = folder / "source.c"
    source.write_text("int answer(void) { return 42; }\n")
    command = ["gcc", "-shared", "-fPIC", "-o", str(file), f"-Wl,-soname,{name}", str(source)]
    subprocess.run([*command, "-Wl,--no-as-needed", *map(str, uses)], check=True)
    return file


@needs_linux
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf to compare with")
def test_needed_libraries_are_those_of_readelf() -> None:
    pybind = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    file = Path(pybind.__file__)
    text = subprocess.run(["readelf", "-d", str(file)], capture_output=True, text=True, check=True)
    lines = [line for line in text.stdout.splitlines() if "(NEEDED)" in line]
    expected = [line.split("[")[1].rstrip("]") for line in lines]
    assert len(expected) > 3
    assert needed_libraries(file) == expected


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no library" * 10)
    with pytest.raises(ValueError, match="no 64-bit little-endian ELF file"):
        needed_libraries(tmp_path / "text")


@needs_gcc
def test_a_library_of_a_package_is_opened_and_then_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes a provider load without LD_LIBRARY_PATH, on real libraries."""
    unique = uuid.uuid4().hex  # no library of this name was ever open in this process
    name = f"libcu{unique}.so.7"
    inner = built(tmp_path / "site" / "nvidia" / "thing" / "lib", name)
    outer = built(tmp_path / "capi", f"libouter{unique}.so", uses=(inner,))
    with pytest.raises(OSError, match=name):
        ctypes.CDLL(str(outer))
    missing = load_libraries(outer)
    assert list(missing.missing) == [name]
    with pytest.raises(OSError, match=name):
        ctypes.CDLL(str(outer))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    loaded = load_libraries(outer)
    assert (dict(loaded.found), dict(loaded.missing)) == ({name: str(inner)}, {})
    assert loaded.problem is None
    assert ctypes.CDLL(str(outer)).answer() == 42


@needs_gcc
def test_what_is_missing_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("libcublasLt.so.13", "libcurand.so.10", "libcudart.so.13", DRIVER)
    uses = tuple(built(tmp_path / str(at), name) for at, name in enumerate(names))
    provider = built(tmp_path / "onnxruntime" / "capi", PROVIDER, uses=uses)
    monkeypatch.setattr(cuda_libraries, "_opened", lambda name: None)
    status = load_libraries(provider)
    assert status.cuda == 13
    # Builds for CUDA 13 open cuDNN later, so the file itself does not say that they need it.
    assert set(status.missing) == {*names, "libcudnn.so.9"}
    assert status.packages == (
        "nvidia-cublas~=13.0",
        "nvidia-cuda-runtime~=13.0",
        "nvidia-cudnn-cu13~=9.0",
        "nvidia-curand~=10.0",
    )
    module = types.ModuleType("onnxruntime")
    module.__path__ = [str(tmp_path / "onnxruntime")]
    problem = cuda_problem(module)
    assert problem is not None
    assert '(CUDA 13); install them: pip install "nvidia-cublas~=13.0" "nvidia-cuda' in problem
    assert problem.endswith("there is no NVIDIA driver (libcuda.so.1 cannot be loaded)")


@pytest.mark.parametrize(
    ("library", "cuda", "package"),
    [
        # As the wheels on PyPI hold them: nvidia-cublas-cu11 11.11.3.6, nvidia-cudnn-cu11 8.9.6.50,
        # nvidia-cublas 13.10.0.20, nvidia-cufft 12.5.0.14, nvidia-cudnn-cu13 9.28.1.4.
        ("libcublasLt.so.11", 11, "nvidia-cublas-cu11"),
        ("libcudart.so.11.0", 11, "nvidia-cuda-runtime-cu11"),
        ("libcudnn.so.8", 11, "nvidia-cudnn-cu11~=8.9"),
        ("libcurand.so.10", 11, "nvidia-curand-cu11"),
        ("libcudnn.so.9", 12, "nvidia-cudnn-cu12~=9.0"),
        ("libcublas.so.12", 12, "nvidia-cublas-cu12"),
        ("libcublas.so.13", 13, "nvidia-cublas~=13.0"),
        ("libcufft.so.12", 13, "nvidia-cufft~=12.0"),
        ("libcurand.so.10", 13, "nvidia-curand~=10.0"),
        ("libcudnn.so.9", 13, "nvidia-cudnn-cu13~=9.0"),
        ("libnvrtc.so.13", 13, "nvidia-cuda-nvrtc~=13.0"),
        (DRIVER, 13, "the NVIDIA driver"),
        ("libnvinfer.so.10", 13, "your system's package of libnvinfer.so.10"),
    ],
)
def test_package_of(library: str, cuda: int, package: str) -> None:
    assert package_of(library, cuda) == package


def test_nothing_missing_is_no_problem() -> None:
    assert CudaLibraries(13, {"libcudart.so.13": "linker"}, {}).problem is None


class Driver:
    """What `nvidia_gpus` calls of the driver's library, for two GPUs."""

    def __init__(self, code: int = 0) -> None:
        self.code = code

    def cuInit(self, flags: int) -> int:
        return self.code

    def cuDeviceGetCount(self, count: object) -> int:
        ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = 2  # type: ignore[arg-type]
        return 0

    def cuDeviceGet(self, device: object, index: int) -> int:
        ctypes.cast(device, ctypes.POINTER(ctypes.c_int))[0] = index  # type: ignore[arg-type]
        return 0

    def cuDeviceGetName(self, name: ctypes.Array[ctypes.c_char], size: int, device: object) -> int:
        name.value = f"GPU {device.value}".encode()  # type: ignore[attr-defined]
        return 0


def test_gpus_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_libraries.ctypes, "CDLL", lambda name: Driver())
    assert nvidia_gpus() == (("GPU 0", "GPU 1"), None)
    monkeypatch.setattr(
        cuda_libraries, "load_libraries", lambda provider: CudaLibraries(13, {}, {})
    )
    monkeypatch.setattr(cuda_libraries, "_provider_file", lambda module: Path(PROVIDER))
    module = types.ModuleType("onnxruntime")
    assert cuda_problem(module, 1) is None
    assert cuda_problem(module, 2) == "there is no GPU 2, only GPU 0, GPU 1 (counted from 0)"


def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_libraries.ctypes, "CDLL", lambda name: Driver(code=100))
    names, problem = nvidia_gpus()
    assert names == ()
    assert problem is not None
    assert "shows no GPU" in problem
    assert "100" in problem


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda_libraries.ctypes, "CDLL", refuse)
    assert nvidia_gpus() == (
        (),
        "there is no NVIDIA driver: libcuda.so.1: cannot open shared object file",
    )
