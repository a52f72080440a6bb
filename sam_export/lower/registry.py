"""The targets that a captured step can be lowered to: one line each."""

from __future__ import annotations

import importlib

from sam_export._compat.origins import origin_of
from sam_export.artifact.folder import Lowered
from sam_export.errors import LoweringError
from sam_export.tracing.captured_step import CapturedStep
from sam_export.tracing.recurrent import LOOPS

LOWERINGS = {
    "onnx": "sam_export.lower.onnx",
    "onnx-training": "sam_export.lower.onnx_training",
    "ort-artifacts": "sam_export.lower.ort_artifacts",
    "aot-inductor": "sam_export.lower.aot_inductor",
    "torchscript": "sam_export.lower.torchscript",
    "torch-compile": "sam_export.lower.torch_compile",
}
"""Target to the module whose ``lower(captured)`` makes it."""


DEVICES = ("cpu", "cuda")

MADE_FOR_A_DEVICE = ("aot-inductor", "onnx", "onnx-training", "ort-artifacts")
"""Targets whose files are written for a kind of device; their ``lower`` takes it."""

WITH_LOOPS = ("onnx", "onnx-training", "ort-artifacts")
"""Targets that can hold the loop of a recurrence over a symbolic number of tokens."""


def lower(captured: CapturedStep, target: str, device: str = "cpu") -> Lowered:
    """``captured`` in the form of ``target``.

    Args:
        captured: The step.
        target: A key of `LOWERINGS`.
        device: What the files are for, ``cpu`` or ``cuda``, where the target depends on it.

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
    if target not in WITH_LOOPS:
        _refuse_loops(captured, target)
    if device not in DEVICES:
        raise LoweringError(
            f"device={device!r}: expected {' or '.join(map(repr, DEVICES))}. Which of several "
            "devices is chosen where the artifact is loaded."
        )
    if target in MADE_FOR_A_DEVICE:
        lowered = module.lower(captured, device)
    elif device == "cpu":
        lowered = module.lower(captured)
    else:
        raise LoweringError(
            f"An artifact of target {target!r} is not made for a device: export it without one, "
            f"and give device={device!r} to load."
        )
    assert isinstance(lowered, Lowered)
    return lowered


def _refuse_loops(captured: CapturedStep, target: str) -> None:
    for program in captured.programs.values():
        for node in program.graph.nodes:
            if node.target in LOOPS:
                where = origin_of(node) or "the step"
                raise LoweringError(
                    f"Target {target!r} cannot hold the recurrence in {where}, whose "
                    "number of tokens is symbolic: only "
                    f"{', '.join(WITH_LOOPS)} can loop. Capture with that number fixed, which "
                    "makes a copy of the cell per token: dynamic='batch'."
                )
