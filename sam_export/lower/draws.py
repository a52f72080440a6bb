"""What becomes of the draws from Philox in a target, and what its manifest says of it."""

from __future__ import annotations

from typing import Any, Literal

import torch

from sam_export._compat import tracing
from sam_export.artifact import philox
from sam_export.step.philox import COMPOSITES
from sam_export.tracing.captured_step import CapturedStep
from sam_export.tracing.randomness import drawn_nodes


def in_aten(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """``program`` with every draw in ATen integer arithmetic."""
    if not drawn_nodes(program.graph):
        return program
    return tracing.decomposed_by(program, COMPOSITES)


def random_details(captured: CapturedStep, made_by: Literal["graph", "session"]) -> dict[str, Any]:
    """Entries of the manifest's ``details``: where random numbers come from.

    ``random_ops``: the operators that draw from torch's generator. ``random_numbers``: for a step
    that draws from Philox, the generator, and whether the graph makes its numbers or the session.
    """
    details: dict[str, Any] = {"random_ops": sorted(set(captured.random_ops))}
    if any(drawn_nodes(program.graph) for program in captured.programs.values()):
        details["random_numbers"] = {"generator": philox.NAME, "made_by": made_by}
    return details
