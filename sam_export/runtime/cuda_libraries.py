"""The shared libraries that ONNX Runtime's CUDA provider needs: found, loaded, or named.

A provider whose libraries are missing does not say so to Python: ONNX Runtime prints a line and
goes on with the CPU. Here each library is opened first, from where the system looks and from
NVIDIA's packages on PyPI. One that is open is found by the provider by its name, so no search path
has to be set (onnxruntime-training 1.19.2 does not look into those packages by itself).
"""

from __future__ import annotations

import ctypes
import re
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

DRIVER = "libcuda.so.1"
"""Belongs to the NVIDIA driver; no package of PyPI has it."""

PROVIDER = "libonnxruntime_providers_cuda.so"

_PACKAGE = {
    "cublas": "cublas",
    "cublasLt": "cublas",
    "cudart": "cuda-runtime",
    "cudnn": "cudnn",
    "cufft": "cufft",
    "curand": "curand",
    "nvrtc": "cuda-nvrtc",
}
"""Name of a library to the middle of its package's name."""

_VERSIONS = {
    11: {"cudnn": "~=8.9"},
    12: {"cudnn": "~=9.0"},
    13: {
        "cublas": "~=13.0",
        "cuda-nvrtc": "~=13.0",
        "cuda-runtime": "~=13.0",
        "cudnn": "~=9.0",
        "cufft": "~=12.0",
        "curand": "~=10.0",
    },
}
"""Version of CUDA to the versions of packages, where the package's name does not fix them."""

_OPENED_LATER = {13: ("libcudnn.so.9",)}
"""Version of CUDA to libraries that builds for it open when a convolution is run."""

_OPENED_BY_CUDNN_8 = (
    "libnvrtc.so.11.2",
    "libcudnn_ops_infer.so.8",
    "libcudnn_ops_train.so.8",
    "libcudnn_cnn_infer.so.8",
    "libcudnn_cnn_train.so.8",
    "libcudnn_adv_infer.so.8",
    "libcudnn_adv_train.so.8",
)
"""Each after those that it needs; the folder in which cuDNN 8 looks for the first is not the one of
the package on PyPI. Where one is missing, cuDNN says so when it needs it."""


@dataclass(frozen=True)
class CudaLibraries:
    """What was found of the libraries of one provider.

    Attributes:
        cuda: Version of CUDA that the provider is built for, such as 13; None where it needs no
            runtime of CUDA.
        found: Library to the file it was opened from, or ``linker`` where
            the dynamic linker knows it.
        missing: Library to what brings it: a requirement for pip, or what else to install.
    """

    cuda: int | None
    found: Mapping[str, str]
    missing: Mapping[str, str]

    @property
    def packages(self) -> tuple[str, ...]:
        """Requirements for pip that bring what is missing."""
        from_pip = {item for item in self.missing.values() if item.startswith("nvidia-")}
        return tuple(sorted(from_pip))

    @property
    def problem(self) -> str | None:
        """What is missing and what to do; None where nothing is."""
        if not self.missing:
            return None
        parts = []
        libraries = [name for name in self.missing if name != DRIVER]
        if libraries:
            quoted = " ".join(f'"{item}"' for item in self.packages)
            install = f": pip install {quoted}" if quoted else ""
            parts.append(
                f"it cannot load {', '.join(libraries)} (CUDA {self.cuda}); install them{install}"
            )
        if DRIVER in self.missing:
            parts.append(f"there is no NVIDIA driver ({DRIVER} cannot be loaded)")
        return "; ".join(parts)


def package_of(library: str, cuda: int) -> str:
    """The requirement for pip that brings a library of CUDA.

    Args:
        library: As the dynamic linker names it, ``libcublasLt.so.13``.
        cuda: Version of CUDA that the program is built for.

    Returns:
        Such as ``nvidia-cublas~=13.0``; words for a library that none of NVIDIA's packages has.
    """
    if library == DRIVER:
        return "the NVIDIA driver"
    match = re.fullmatch(r"lib(\w+?)\.so[.\d]*", library)
    middle = _PACKAGE.get(match[1]) if match else None
    if middle is None:
        return f"your system's package of {library}"
    # From CUDA 13 on the version is in the number, but for cuDNN, which has one of its own.
    suffix = f"-cu{cuda}" if cuda < 13 or middle == "cudnn" else ""
    return f"nvidia-{middle}{suffix}{_VERSIONS.get(cuda, {}).get(middle, '')}"


def load_libraries(provider: Path) -> CudaLibraries:
    """Opens every library that ``provider`` needs, and keeps it open.

    Args:
        provider: `PROVIDER` of an installed ONNX Runtime.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no 64-bit ELF file.
    """
    needed = [name for name in needed_libraries(provider) if _is_of_nvidia(name)]
    numbers = [re.match(r"libcudart\.so\.(\d+)", name) for name in needed]
    cuda = next((int(match[1]) for match in numbers if match), None)
    needed += [name for name in _OPENED_LATER.get(cuda or 0, ()) if name not in needed]
    found: dict[str, str] = {}
    missing: dict[str, str] = {}
    for name in reversed(needed):  # the linker lists what depends on others first
        where = _opened(name)
        if where is None:
            missing[name] = package_of(name, cuda or 0)
        else:
            found[name] = where
    if "libcudnn.so.8" in found:
        for part in _OPENED_BY_CUDNN_8:
            _opened(part)
    return CudaLibraries(cuda, found, missing)


def cuda_problem(module: ModuleType, number: int = 0) -> str | None:
    """Why the CUDA provider of an ONNX Runtime cannot start; None where nothing is missing.

    Its libraries stay open, so that the provider finds them.

    Args:
        module: The ``onnxruntime`` module.
        number: Of the GPU that is wanted.
    """
    provider = _provider_file(module)
    if provider is None:
        return None
    problem = load_libraries(provider).problem
    if problem is not None:
        return problem
    gpus, problem = nvidia_gpus()
    if problem is None and number >= len(gpus):
        return f"there is no GPU {number}, only {', '.join(gpus)} (counted from 0)"
    return problem


def needed_libraries(file: Path) -> list[str]:
    """The libraries that a shared library asks the dynamic linker for, in its order.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no 64-bit little-endian ELF file.

    Source: System V Application Binary Interface, chapters 4 and 5 (section headers, the dynamic
        section).
    """
    with file.open("rb") as stream:
        head = stream.read(64)
        if head[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{file} is no 64-bit little-endian ELF file.")
        (start,) = struct.unpack_from("<Q", head, 0x28)
        size, count = struct.unpack_from("<HH", head, 0x3A)
        stream.seek(start)
        table = stream.read(size * count)
        sections = [struct.unpack_from("<IIQQQQI", table, size * i) for i in range(count)]
        names: list[str] = []
        for _, kind, _, _, offset, length, link in sections:
            if kind != 6:  # SHT_DYNAMIC
                continue
            stream.seek(offset)
            entries = struct.iter_unpack("<qQ", stream.read(length))
            stream.seek(sections[link][4])
            strings = stream.read(sections[link][5])
            for tag, value in entries:
                if tag == 1:  # DT_NEEDED
                    names.append(strings[value : strings.index(b"\0", value)].decode())
    return names


def nvidia_gpus() -> tuple[tuple[str, ...], str | None]:
    """Names of the GPUs that the NVIDIA driver shows to this process, and why there is none."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError as error:
        return (), f"there is no NVIDIA driver: {error}"
    code = driver.cuInit(0)
    count = ctypes.c_int(0)
    code = code or driver.cuDeviceGetCount(ctypes.byref(count))
    if code or not count.value:
        return (), f"the NVIDIA driver shows no GPU (cuInit and cuDeviceGetCount say {code})"
    names = []
    for index in range(count.value):
        device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(name, len(name), device)
        names.append(name.value.decode(errors="replace"))
    return tuple(names), None


def _provider_file(module: ModuleType) -> Path | None:
    """The CUDA provider of an installed ONNX Runtime; None where it has another name or place."""
    for folder in getattr(module, "__path__", ()):
        file = Path(folder, "capi", PROVIDER)
        if file.is_file():
            return file
    return None


def _is_of_nvidia(library: str) -> bool:
    return library == DRIVER or re.match(r"lib(cu|nv)", library) is not None


def _opened(library: str) -> str | None:
    """Opens a library for good; where it was found, or None."""
    try:
        ctypes.CDLL(library)
    except OSError:
        pass
    else:
        return "linker"
    for file in _in_packages(library, sys.path):
        try:
            ctypes.CDLL(str(file))
        except OSError:
            continue
        return str(file)
    return None


def _in_packages(library: str, path: Iterable[str]) -> list[Path]:
    """Where NVIDIA's packages on the import path have a library."""
    return [file for entry in path for file in sorted(Path(entry).glob(f"nvidia/*/lib/{library}"))]
