"""Target ``onnx``: the step in standard ONNX operators, for ONNX Runtime without torch."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir

from sam_export.artifact.contract import ProgramSpec, discarded_if_not_finite
from sam_export.artifact.folder import Lowered, LoweredFile
from sam_export.errors import LoweringError
from sam_export.lower.draws import random_details
from sam_export.lower.onnx_graph import IR_VERSION, OPSET, onnx_model
from sam_export.lower.onnx_guard import guard_update
from sam_export.lower.onnx_in_place import in_place
from sam_export.lower.onnx_random import random_inputs
from sam_export.lower.result import lowered
from sam_export.tracing.captured_step import CapturedStep

TARGET = "onnx"


def lower(captured: CapturedStep) -> Lowered:
    """The programs of a step as ONNX models: standard operators, opset 18, IR version 10.

    All state is graph inputs; ``details["in_place"]`` says for every state tensor that changes
    whether it may be overwritten in place (``""``) or why not, and
    ``details["random_numbers"]["inputs"]`` which inputs of random words the session fills.

    Raises:
        LoweringError: The step draws from torch's generator, or an operator has no ONNX form.
    """
    if captured.random_ops:
        counted = ", ".join(sorted(set(captured.random_ops)))
        raise LoweringError(
            f"The step draws from torch's own generator ({counted}), which ONNX Runtime does not "
            'have. Use Semantics(generator="philox"), or a torch target.'
        )
    if not captured.portable:
        raise LoweringError(
            "The step was captured with portable=False, which keeps kernels that ONNX does not "
            "have. Capture with portable=True."
        )
    files: dict[str, LoweredFile] = {}
    details: dict[str, Any] = {"opset": OPSET, "ir_version": IR_VERSION}
    drawn: dict[str, Any] = {}
    for spec in captured.contract.programs:
        _refuse_derived_sizes(captured, spec)
        program = captured.programs[spec.name]
        model = onnx_model(program, spec, captured.contract)
        drawn[spec.name] = random_inputs(program, spec, captured.contract)
        if spec.name == "step":
            discarded = discarded_if_not_finite(spec, captured.semantics)
            if discarded:
                guard_update(model, spec, discarded)
            details["in_place"] = in_place(model, spec)
        proto = ir.to_proto(model)
        try:
            onnx.checker.check_model(proto, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise LoweringError(
                f"Program {spec.name!r} became an ONNX graph that is not valid: {error}"
            ) from error
        data = proto.SerializeToString(deterministic=True)
        files[spec.name] = LoweredFile(f"{spec.name}.onnx", data)
    details |= random_details(captured, made_by="session")
    if "random_numbers" in details:
        details["random_numbers"]["inputs"] = drawn
    packages = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy")
    return lowered(captured, TARGET, files, details, packages)


def _refuse_derived_sizes(captured: CapturedStep, spec: ProgramSpec) -> None:
    """The session makes room for each result before it runs, so it has to know the size."""
    for output in spec.outputs:
        derived = [
            s for s in output.shape if isinstance(s, str) and s not in captured.contract.dims
        ]
        if derived:
            raise LoweringError(
                f"Output {output.name!r} of program {spec.name!r} has the size {derived[0]}, which "
                "is computed from a symbolic size. Return it in a shape whose sizes are those of "
                "the batch."
            )
