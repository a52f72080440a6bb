"""The targets that a captured step can be lowered to: one line each."""

from __future__ import annotations

import importlib

from sam_export.artifact.folder import Lowered
from sam_export.errors import LoweringError
from sam_export.tracing.captured_step import CapturedStep

LOWERINGS = {
    "onnx": "sam_export.lower.onnx",
    "torch-compile": "sam_export.lower.torch_compile",
}
"""Target to the module whose ``lower(captured)`` makes it."""


def lower(captured: CapturedStep, target: str) -> Lowered:
    """``captured`` in the form of ``target``.

    Raises:
        LoweringError: There is no such target, its package is missing, or it cannot hold this step.
    """
    if target not in LOWERINGS:
        raise LoweringError(
            f"There is no target {target!r}; targets are {', '.join(sorted(LOWERINGS))}."
        )
    try:
        module = importlib.import_module(LOWERINGS[target])
    except ModuleNotFoundError as error:
        raise LoweringError(
            f"Target {target!r} needs the package {error.name!r}, which is not installed. "
            "Install sam_export[export]."
        ) from error
    lowered = module.lower(captured)
    assert isinstance(lowered, Lowered)
    return lowered
