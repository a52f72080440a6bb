"""Target ``onnx``: the step in standard ONNX operators, for ONNX Runtime without torch."""

from __future__ import annotations

from sam_export.artifact.folder import Lowered
from sam_export.lower.onnx_artifact import lower_with
from sam_export.lower.onnx_ops import PORTABLE
from sam_export.tracing.captured_step import CapturedStep

TARGET = "onnx"


def lower(captured: CapturedStep, device: str = "cpu") -> Lowered:
    """The programs of a step as ONNX models in standard operators; see `onnx_artifact.lower_with`.

    Args:
        captured: The step.
        device: ``cpu`` or ``cuda``: what the models are meant for.

    Raises:
        LoweringError: The step draws from torch's generator, or an operator has no ONNX form, or
            no kernel on the device.
    """
    return lower_with(captured, TARGET, PORTABLE, device)
