"""AOTInductor: compiling a program into a package, and running one."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sam_export._compat.inductor import EAGER_NUMERICS
from sam_export._compat.precision import older_settings_readable


def package_bytes(program: torch.export.ExportedProgram, eager_random: bool) -> bytes:
    """A program compiled for this machine, as a ``.pt2`` package without weights.

    ``torch._inductor.aoti_compile_and_package`` is the documented way, in a private module.

    Args:
        program: What to compile.
        eager_random: Draw random numbers as eager does.
    """
    with (
        tempfile.TemporaryDirectory(prefix="sam_export_") as folder,
        warnings.catch_warnings(),
        older_settings_readable(),
    ):
        warnings.simplefilter("ignore")  # pytree's and torch.jit's, about themselves
        path = Path(folder) / "program.pt2"
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            # Threads are those of the process that runs, not of the one that compiles.
            inductor_configs={
                "fallback_random": eager_random,
                "cpp.dynamic_threads": True,
                **EAGER_NUMERICS,
            },
        )
        return path.read_bytes()


def load_package(path: Path, device: torch.device) -> Callable[[list[Tensor]], list[Tensor]]:
    """The program of a package.

    ``torch._inductor.aoti_load_package`` wraps the same class, with a flattening of arguments and
    results that takes longer than a small step, and imports Inductor.

    Raises:
        RuntimeError: The file is not a package that this torch can load.
    """
    index = -1 if device.index is None else device.index
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, index)  # type: ignore[attr-defined]
    boxed_run: Callable[[list[Tensor]], list[Tensor]] = loader.boxed_run
    if device.type != "cuda":
        return boxed_run

    def run(tensors: list[Tensor]) -> list[Tensor]:
        with torch.cuda.device(device):  # it launches on the stream of the current device
            return boxed_run(tensors)

    return run


def cuda_architecture(device: torch.device) -> str | None:
    """``sm_90`` and so on; None for the CPU."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
