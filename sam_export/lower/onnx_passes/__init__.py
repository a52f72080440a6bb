"""Passes over an ONNX graph, in the order in which they run.

A pass is an `onnx_ir.passes.InPlacePass`: ``requires`` raises if the model is not one that the pass
can take, ``ensures`` if the result does not keep what the pass promises, and the result says
whether the model changed. Both checks run at every export. To add one: a file of this folder and a
line of `PASSES`; ``tests/lower/test_onnx_passes.py`` puts every pass through the same questions.
"""

from __future__ import annotations

import onnx_ir as ir

from sam_export.lower.onnx_passes.common_subexpressions import CommonSubexpressions
from sam_export.lower.onnx_passes.constants import FoldConstants, ShareConstants
from sam_export.lower.onnx_passes.copies import RemoveCopies
from sam_export.lower.onnx_passes.dead_code import RemoveDeadCode
from sam_export.lower.onnx_passes.inlining import Inline

PASSES: tuple[ir.passes.InPlacePass, ...] = (
    Inline(),
    FoldConstants(),
    RemoveCopies(),
    CommonSubexpressions(),
    RemoveDeadCode(),
    ShareConstants(),
)


def simplify(model: ir.Model) -> None:
    """Runs all `PASSES` once, in place."""
    for step in PASSES:
        step(model)
