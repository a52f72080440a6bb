"""`export` and `load`: where lowering and running meet."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from typing import TYPE_CHECKING

from sam_export.artifact.folder import Artifact, open_artifact, write_artifact
from sam_export.errors import SessionError
from sam_export.runtime.cuda_options import CudaOptions
from sam_export.runtime.engines import open_session
from sam_export.runtime.session import Session

if TYPE_CHECKING:
    from sam_export.tracing.captured_step import CapturedStep


def export(
    captured: CapturedStep,
    path: str | os.PathLike[str],
    target: str = "onnx",
    overwrite: bool = False,
    device: str = "cpu",
) -> Artifact:
    """Lowers a captured step to ``target`` and writes it as a folder.

    Args:
        captured: What `capture` returned.
        path: The folder to make. It appears only when it is complete.
        target: ``onnx``, ``onnx-training``, ``ort-artifacts``, ``torchscript``, ``aot-inductor``
            or ``torch-compile``.
        overwrite: Whether an artifact that is there already may be replaced.
        device: What the artifact is for, ``cpu`` or ``cuda``. ``aot-inductor`` compiles for it.
            The ONNX targets write a step that stays on the device, and refuse an operator that has
            no kernel there; it runs on the CPU, too. ``torchscript`` and ``torch-compile``
            take no device: they run on either.

    Raises:
        LoweringError: The target cannot express the step, or not for that device; nothing is
            written.
        ArtifactError: The folder exists, or cannot be written.
    """
    from sam_export.lower.registry import lower

    return write_artifact(lower(captured, target, device), path, overwrite=overwrite)


def load(
    source: CapturedStep | str | os.PathLike[str],
    device: str = "cpu",
    target: str | None = None,
    threads: int | None = None,
    cuda: CudaOptions | None = None,
) -> Session:
    """A session with the artifact's initial state, ready to step.

    Args:
        source: Folder of an artifact, or a captured step (which is then lowered to ``target`` into
            a temporary folder and loaded from there: what runs is what would be shipped).
        device: ``cpu``, ``cuda`` or ``cuda:<index>``. It is never silently another one.
        target: Needed for a captured step only; a folder knows its own.
        threads: Threads of one operator; None leaves the runtime's choice.
        cuda: Options for a CUDA device: memory limit, TF32 (off unless asked for), CUDA graphs, and
            whether nodes may run on the CPU. None: the defaults.

    Raises:
        ArtifactError: The folder is missing, damaged, or of another version.
        RuntimeUnavailableError: The runtime or the device is not on this machine, or a step in ONNX
            would leave the CUDA device; the message names the nodes.
        SessionError: ``target`` is missing for a captured step, or not the folder's; or ``cuda``
            is given for another device, or asks for what the target cannot follow.
    """
    if isinstance(source, (str, os.PathLike)):
        artifact = open_artifact(source)
        if target not in (None, artifact.target):
            raise SessionError(
                f"{source} is an artifact of target {artifact.target!r}, not {target!r}."
            )
        return open_session(artifact, device, threads, cuda)
    if target is None:
        raise SessionError(
            "load(captured) needs the target to run it as, such as target='torch-compile'."
        )
    folder = tempfile.mkdtemp(prefix="sam_export-")
    try:
        built_for = device_to_build_for(target, device)
        artifact = export(source, os.path.join(folder, "step"), target, device=built_for)
        session = open_session(artifact, device, threads, cuda)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(session, shutil.rmtree, folder, ignore_errors=True)
    return session


def device_to_build_for(target: str, device: str) -> str:
    """What `export` is to be told for an artifact that will run on ``device``."""
    from sam_export.lower.registry import MADE_FOR_A_DEVICE

    return device.partition(":")[0] if target in MADE_FOR_A_DEVICE else "cpu"
