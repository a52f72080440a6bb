"""Which engines this machine has, and what is missing for each target.

Nothing here imports torch, onnx or ONNX Runtime until a function needs the module itself: versions
come from the installed packages' metadata.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from sam_export._compat.onnxruntime_import import without_ortmodule
from sam_export.errors import RuntimeUnavailableError
from sam_export.runtime.cuda_libraries import cuda_problem

ONNXRUNTIME_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-training",
    "onnxruntime-training-cpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-migraphx",
    "onnxruntime-rocm",
    "onnxruntime-qnn",
    "ort-nightly",
    "ort-nightly-gpu",
)
"""Packages that all install the import name ``onnxruntime``; only one can be there."""

_INSTALL_ORT = 'pip install "sam_export[ort]"'
_INSTALL_ORT_GPU = 'pip install "sam_export[ort-gpu]"'
_INSTALL_ORT_TRAINING = 'pip install "sam_export[ort-training]"'
_INSTALL_ORT_TRAINING_GPU = 'pip install "sam_export[ort-training-gpu]"'
_INSTALL_EXPORT = 'pip install "sam_export[export]"'


@dataclass(frozen=True)
class Missing:
    """Something that a target needs and this machine lacks.

    Attributes:
        what: What is missing, and what was found instead.
        install: The command that brings it.
    """

    what: str
    install: str


@dataclass(frozen=True)
class TargetStatus:
    """Whether a target works on this machine.

    Attributes:
        target: Its name.
        export: What is missing for exporting to it; empty when nothing is.
        run: What is missing for training with it; empty when nothing is.
    """

    target: str
    export: tuple[Missing, ...]
    run: tuple[Missing, ...]


@dataclass(frozen=True)
class RuntimeStatus:
    """An engine or library that targets are built on.

    Attributes:
        name: Name of the package.
        version: Its version; None when it is not installed.
        providers: ONNX Runtime's execution providers, best first; empty for the others.
        problem: Why it cannot be used although it is installed; None when it can.
        cuda_problem: Why its CUDA provider cannot start; None when it can, or when it has none.
    """

    name: str
    version: str | None
    providers: tuple[str, ...] = ()
    problem: str | None = None
    cuda_problem: str | None = None


@dataclass(frozen=True)
class MachineStatus:
    """Everything that `sam-export targets` shows.

    Attributes:
        runtimes: The engines and libraries, installed or not.
        targets: The targets, in the order of `TARGETS`.
    """

    runtimes: tuple[RuntimeStatus, ...]
    targets: tuple[TargetStatus, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def installed_version(distribution: str) -> str | None:
    """Version of an installed package by its name on PyPI; None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def onnxruntime_distributions() -> dict[str, str]:
    """The installed packages that provide the import name ``onnxruntime``, with their versions."""
    found = {name: installed_version(name) for name in ONNXRUNTIME_DISTRIBUTIONS}
    return {name: version for name, version in found.items() if version is not None}


def require_onnxruntime() -> ModuleType:
    """The ``onnxruntime`` module.

    Raises:
        RuntimeUnavailableError: No ONNX Runtime is installed, or more than one package of it, or
            it cannot be loaded.
    """
    found = onnxruntime_distributions()
    if len(found) > 1:
        listed = ", ".join(f"{name} {version}" for name, version in found.items())
        raise RuntimeUnavailableError(
            f"{len(found)} packages of ONNX Runtime are installed: {listed}. They share the import "
            "name `onnxruntime` and overwrite each other's files. Uninstall all of them "
            f"(pip uninstall -y {' '.join(found)}), then install the one you want."
        )
    try:
        with without_ortmodule():
            module = importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise RuntimeUnavailableError(_cannot_load(found, error)) from error
        raise RuntimeUnavailableError(
            "This needs ONNX Runtime, and none is installed. Install one of its packages: "
            f"{_INSTALL_ORT} (CPU), {_INSTALL_ORT_GPU} (CUDA)."
        ) from error
    except ImportError as error:
        raise RuntimeUnavailableError(_cannot_load(found, error)) from error
    if not hasattr(module, "InferenceSession"):  # an uninstall left the empty folder
        raise RuntimeUnavailableError(_emptied(found, module))
    return module


def require_training_build() -> ModuleType:
    """The ``onnxruntime`` module, which is a training build.

    Raises:
        RuntimeUnavailableError: There is none, or it is a build for inference.
    """
    module = require_onnxruntime()
    native = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    if not hasattr(native, "Module"):
        found = onnxruntime_distributions()
        listed = ", ".join(f"{name} {version}" for name, version in found.items())
        raise RuntimeUnavailableError(
            "This target needs a training build of ONNX Runtime; "
            f"{listed or module.__version__} is one for inference. Replace it: "
            f"pip uninstall -y {' '.join(found)} && {_install_training(found)}."
        )
    return module


def require_provider(device: str) -> list[str]:
    """Names of the execution providers for ``device``, in the order ONNX Runtime takes them.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:<number>``.

    Returns:
        ``["CPUExecutionProvider"]``, or ``["CUDAExecutionProvider", "CPUExecutionProvider"]``. The
        CPU provider is in the second one since ONNX Runtime adds it in any case; that the CUDA one
        really came up can only be seen from the session (``get_providers()[0]``).

    Raises:
        RuntimeUnavailableError: The device has another form, this build of ONNX Runtime has no
            provider for it, or the provider's libraries, the driver or the GPU are missing.
    """
    kind, number = parse_device(device)
    module = require_onnxruntime()
    available = module.get_available_providers()
    wanted = ["CUDAExecutionProvider"] if kind == "cuda" else []
    wanted.append("CPUExecutionProvider")
    if wanted[0] in available:
        problem = cuda_problem(module, number) if kind == "cuda" else None
        if problem is not None:
            raise RuntimeUnavailableError(
                f"device={device!r} needs {wanted[0]}, which cannot start here: {problem}."
            )
        return wanted
    found = onnxruntime_distributions()
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    replace = f"pip uninstall -y {' '.join(found)} && " if found else ""
    install = _INSTALL_ORT_GPU if kind == "cuda" else _INSTALL_ORT
    if kind == "cuda" and any("training" in name for name in found):
        install = f"{_INSTALL_ORT_TRAINING_GPU} in Python 3.11, or for the target onnx {install}"
    raise RuntimeUnavailableError(
        f"device={device!r} needs {wanted[0]}; the ONNX Runtime of this machine "
        f"({listed or 'not installed by pip'}) has only {', '.join(available)}. Install a build "
        f"that has it: {replace}{install}."
    )


def parse_device(device: str) -> tuple[str, int]:
    """Kind and number of a device: ``("cpu", 0)``, ``("cuda", 1)``.

    Raises:
        RuntimeUnavailableError: Another form.
    """
    match = re.fullmatch(r"(cpu)|(cuda)(?::(\d+))?", device)
    if match is None:
        raise RuntimeUnavailableError(
            f"Unknown device {device!r}; expected 'cpu', 'cuda' or 'cuda:<number>'."
        )
    return match[1] or match[2], int(match[3] or 0)


def machine_status() -> MachineStatus:
    """What this machine has, and what each target lacks on it."""
    return MachineStatus(
        runtimes=(
            *(RuntimeStatus(name, installed_version(name)) for name in _LIBRARIES),
            *_onnxruntime_status(),
        ),
        targets=tuple(target_status(name) for name in TARGETS),
    )


def target_status(target: str) -> TargetStatus:
    """What ``target`` lacks on this machine.

    Raises:
        RuntimeUnavailableError: There is no such target.
    """
    if target not in TARGETS:
        raise RuntimeUnavailableError(
            f"Unknown target {target!r}; the targets are {', '.join(TARGETS)}."
        )
    export, run = TARGETS[target]
    return TargetStatus(target, _missing(export), _missing(run))


def _at_least(distribution: str, minimum: str, install: str) -> Callable[[], Missing | None]:
    def check() -> Missing | None:
        found = installed_version(distribution)
        if found is None:
            return Missing(f"{distribution} >= {minimum}", install)
        if _release(found) < _release(minimum):
            return Missing(f"{distribution} >= {minimum} (found {found})", install)
        return None

    return check


def _onnxruntime() -> Missing | None:
    try:
        require_onnxruntime()
    except RuntimeUnavailableError:
        found = onnxruntime_distributions()
        if not found:
            return Missing("ONNX Runtime", _INSTALL_ORT)
        if len(found) == 1:
            ((name, version),) = found.items()
            return Missing(
                f"an ONNX Runtime that can be loaded ({name} {version} cannot)",
                f"pip install --force-reinstall --no-deps {name}=={version}",
            )
        return Missing(
            f"one package of ONNX Runtime instead of {len(found)} ({', '.join(found)})",
            f"pip uninstall -y {' '.join(found)} && {_INSTALL_ORT}",
        )
    return None


def _training_build() -> Missing | None:
    found = onnxruntime_distributions()
    remove = f"pip uninstall -y {' '.join(found)} && " if found else ""
    install = f"{remove}{_install_training(found)}"
    missing = _onnxruntime()
    if missing is not None:
        if not found:
            return Missing("a training build of ONNX Runtime", install)
        return Missing(f"a training build of ONNX Runtime, and {missing.what}", install)
    try:
        require_training_build()
    except RuntimeUnavailableError:
        listed = ", ".join(f"{name} {version}" for name, version in found.items())
        return Missing(f"a training build of ONNX Runtime (found {listed})", install)
    return None


def _install_training(found: Iterable[str]) -> str:
    """The command that brings a training build, for CUDA where a build for it was there."""
    gpu = any("gpu" in name or name == "onnxruntime-training" for name in found)
    install = _INSTALL_ORT_TRAINING_GPU if gpu else _INSTALL_ORT_TRAINING
    newest, here = (3, 11 if gpu else 12), sys.version_info[:2]
    if here <= newest:
        return install
    return f"{install} in Python {newest[0]}.{newest[1]}; there is none for {here[0]}.{here[1]}"


def _cpp_compiler() -> Missing | None:
    wanted = os.environ.get("CXX") or "g++"  # the same rule as Inductor's
    if shutil.which(wanted.split()[0]):
        return None
    return Missing(f"a C++ compiler ({wanted})", "apt-get install g++")


_TORCH = _at_least("torch", "2.11", _INSTALL_EXPORT)
_EXPORTER = (
    _at_least("onnx", "1.16", _INSTALL_EXPORT),
    _at_least("onnxscript", "0.7", _INSTALL_EXPORT),
)
_LIBRARIES = ("torch", "onnx", "onnxscript")

Needs = tuple[Callable[[], Missing | None], ...]

TARGETS: dict[str, tuple[Needs, Needs]] = {
    "torch-compile": ((_TORCH,), (_TORCH, _cpp_compiler)),
    "torchscript": ((_TORCH,), (_TORCH,)),
    "aot-inductor": ((_TORCH, _cpp_compiler), (_TORCH,)),
    "onnx": ((_TORCH, *_EXPORTER), (_onnxruntime,)),
    "onnx-training": ((_TORCH, *_EXPORTER), (_training_build,)),
    "ort-artifacts": (
        (_TORCH, *_EXPORTER, _at_least("flatbuffers", "23.5", _INSTALL_EXPORT)),
        (_training_build,),
    ),
}
"""Target to what exporting to it needs, and what training with it needs."""


def _missing(needs: Needs) -> tuple[Missing, ...]:
    return tuple(missing for missing in (need() for need in needs) if missing is not None)


def _onnxruntime_status() -> list[RuntimeStatus]:
    found = onnxruntime_distributions()
    cuda: str | None = None
    try:
        module = require_onnxruntime()
        providers: tuple[str, ...] = tuple(module.get_available_providers())
        problem = None
        if "CUDAExecutionProvider" in providers:
            cuda = cuda_problem(module)
    except RuntimeUnavailableError as error:
        providers, problem = (), str(error)
        if not found:
            remains = "remains" in problem
            return [RuntimeStatus("onnxruntime", None, problem=problem if remains else None)]
    named = found or {"onnxruntime": str(require_onnxruntime().__version__)}
    return [
        RuntimeStatus(name, version, providers, problem, cuda) for name, version in named.items()
    ]


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()


def _cannot_load(found: dict[str, str], error: ImportError) -> str:
    listed = ", ".join(f"{name} {version}" for name, version in found.items()) or "ONNX Runtime"
    return f"{listed} is installed but cannot be loaded: {error}. Install it again."


def _emptied(found: dict[str, str], module: ModuleType) -> str:
    place = ", ".join(getattr(module, "__path__", [])) or "unknown place"
    empty = f"The import name `onnxruntime` is there ({place}) but holds no InferenceSession: "
    if not found:
        return (
            f"{empty}the remains of an uninstalled package. Remove that folder, then install "
            f"again: {_INSTALL_ORT}."
        )
    ((name, version),) = found.items()
    return (
        f"{empty}the files of {name} {version} went when another package of ONNX Runtime was "
        f"uninstalled. Install it again: pip install --force-reinstall --no-deps {name}=={version}."
    )
