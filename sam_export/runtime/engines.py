"""The engines that run artifacts: one line per target."""

from __future__ import annotations

import importlib

from sam_export.artifact.folder import Artifact
from sam_export.errors import RuntimeUnavailableError
from sam_export.runtime.cuda_options import CudaOptions
from sam_export.runtime.engine import Engine
from sam_export.runtime.session import Session

ENGINES = {
    "onnx": ("sam_export.runtime.ort", "OrtEngine"),
    "onnx-training": ("sam_export.runtime.ort", "OrtTrainingEngine"),
    "ort-artifacts": ("sam_export.runtime.ort_artifacts", "OrtArtifactsEngine"),
    "aot-inductor": ("sam_export.runtime.aot_inductor", "AotInductorEngine"),
    "torchscript": ("sam_export.runtime.torchscript", "TorchScriptEngine"),
    "torch-compile": ("sam_export.runtime.torch_compile", "TorchCompileEngine"),
}
"""Target to module and class of its engine; imported when first used."""


def open_session(
    artifact: Artifact, device: str, threads: int | None, cuda: CudaOptions | None = None
) -> Session:
    """A session over ``artifact`` on ``device``.

    Args:
        artifact: What to run.
        device: ``cpu``, ``cuda`` or ``cuda:<index>``.
        threads: Threads of one operator; None leaves the runtime's choice.
        cuda: Options for a CUDA device; None: the defaults.

    Raises:
        SessionError: Options for another device or target.
        RuntimeUnavailableError: No engine for the artifact's target, or its package is missing.
    """
    if artifact.target not in ENGINES:
        raise RuntimeUnavailableError(
            f"The artifact {artifact.path} is for target {artifact.target!r}; this version runs "
            f"{', '.join(sorted(ENGINES))}."
        )
    module, name = ENGINES[artifact.target]
    try:
        engine_class = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise RuntimeUnavailableError(
            f"Target {artifact.target!r} needs the package {error.name!r}, which is not installed. "
            "`sam-export targets` says what to install."
        ) from error
    engine: Engine = engine_class(artifact, device, threads, cuda)
    return Session(
        engine,
        artifact.contract,
        artifact.semantics,
        artifact.target,
        device,
        artifact.state(),
        artifact.details.get("known_rounding", {}),
        artifact,
    )
