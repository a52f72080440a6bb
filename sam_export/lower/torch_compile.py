"""Target ``torch-compile``: the step as a `torch.export` program, compiled when it is loaded."""

from __future__ import annotations

from sam_export._compat import inductor
from sam_export.artifact.folder import Lowered, LoweredFile
from sam_export.lower.draws import in_aten, random_details
from sam_export.lower.mixed_norms import norms_in_float32
from sam_export.lower.plain_adds import without_factors
from sam_export.lower.result import lowered
from sam_export.tracing.captured_step import CapturedStep

TARGET = "torch-compile"


def lower(captured: CapturedStep) -> Lowered:
    """The programs of a step as ``.pt2`` files of `torch.export.save`."""
    files = {}
    for name, captured_program in captured.programs.items():
        program = without_factors(norms_in_float32(in_aten(captured_program)))
        files[name] = LoweredFile(f"{name}.pt2", inductor.exported_bytes(program))
    details = {**random_details(captured, made_by="graph"), "portable": captured.portable}
    return lowered(captured, TARGET, files, details)
