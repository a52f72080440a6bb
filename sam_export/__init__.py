"""One whole Sharpness-Aware-Minimization training step as one graph that runs everywhere.

Importing this package imports neither torch nor onnx; names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sam_export._version import __version__
from sam_export.errors import (
    ArtifactError,
    CaptureError,
    LoweringError,
    ParityError,
    RuntimeUnavailableError,
    SamExportError,
    SessionError,
    StepConfigError,
)

if TYPE_CHECKING:
    from sam_export.api import export, load
    from sam_export.artifact.folder import Artifact
    from sam_export.artifact.loss_scaling import LossScaling
    from sam_export.artifact.result import AscentResult, DescentResult, StepResult, UpdateResult
    from sam_export.artifact.semantics import Semantics
    from sam_export.parity.check import check_parity
    from sam_export.parity.in_stages import InStages
    from sam_export.parity.locate import Location, locate
    from sam_export.parity.report import ParityReport
    from sam_export.runtime.cuda_options import CudaOptions
    from sam_export.runtime.session import Session
    from sam_export.step.average import EMA
    from sam_export.step.sam import SAM
    from sam_export.step.train_step import TrainStep
    from sam_export.step.variants.asam import ASAM
    from sam_export.step.variants.friendly_sam import FriendlySAM
    from sam_export.step.variants.gsam import GSAM
    from sam_export.step.variants.looksam import LookSAM
    from sam_export.tracing.capture import capture
    from sam_export.tracing.captured_step import CapturedStep

_LAZY = {
    "ASAM": "sam_export.step.variants.asam",
    "EMA": "sam_export.step.average",
    "FriendlySAM": "sam_export.step.variants.friendly_sam",
    "GSAM": "sam_export.step.variants.gsam",
    "LookSAM": "sam_export.step.variants.looksam",
    "SAM": "sam_export.step.sam",
    "TrainStep": "sam_export.step.train_step",
    "LossScaling": "sam_export.artifact.loss_scaling",
    "Semantics": "sam_export.artifact.semantics",
    "AscentResult": "sam_export.artifact.result",
    "DescentResult": "sam_export.artifact.result",
    "StepResult": "sam_export.artifact.result",
    "UpdateResult": "sam_export.artifact.result",
    "Artifact": "sam_export.artifact.folder",
    "CapturedStep": "sam_export.tracing.captured_step",
    "capture": "sam_export.tracing.capture",
    "export": "sam_export.api",
    "load": "sam_export.api",
    "CudaOptions": "sam_export.runtime.cuda_options",
    "Session": "sam_export.runtime.session",
    "check_parity": "sam_export.parity.check",
    "InStages": "sam_export.parity.in_stages",
    "ParityReport": "sam_export.parity.report",
    "locate": "sam_export.parity.locate",
    "Location": "sam_export.parity.locate",
}

__all__ = [
    "ASAM",
    "EMA",
    "GSAM",
    "SAM",
    "Artifact",
    "ArtifactError",
    "AscentResult",
    "CaptureError",
    "CapturedStep",
    "CudaOptions",
    "DescentResult",
    "FriendlySAM",
    "InStages",
    "Location",
    "LookSAM",
    "LossScaling",
    "LoweringError",
    "ParityError",
    "ParityReport",
    "RuntimeUnavailableError",
    "SamExportError",
    "Semantics",
    "Session",
    "SessionError",
    "StepConfigError",
    "StepResult",
    "TrainStep",
    "UpdateResult",
    "__version__",
    "capture",
    "check_parity",
    "export",
    "load",
    "locate",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sam_export' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "onnx", "onnxscript", "onnx_ir"):
            raise
        raise RuntimeUnavailableError(
            f"sam_export.{name} needs the package {error.name!r}, which is not installed here. "
            "Install sam_export[export] on the machine that exports."
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
