"""Target ``onnx-training``: the step with onnxruntime-training's own operators where they pay."""

from __future__ import annotations

from sam_export.artifact.folder import Lowered
from sam_export.lower.onnx_artifact import lower_with
from sam_export.lower.onnx_training_ops import TRAINING
from sam_export.tracing.captured_step import CapturedStep

TARGET = "onnx-training"


def lower(captured: CapturedStep, device: str = "cpu") -> Lowered:
    """The programs of a step as ONNX models; see `onnx_artifact.lower_with`.

    Operators of ``com.microsoft`` where they are exact and faster (`onnx_training_ops`), standard
    ones elsewhere. Such models load in onnxruntime-training only.

    Args:
        captured: The step.
        device: ``cpu`` or ``cuda``: what the models are meant for.

    Raises:
        LoweringError: The step draws from torch's generator, or an operator has no ONNX form, or
            no kernel on the device.
    """
    return lower_with(captured, TARGET, TRAINING, device)
