"""What the targets ``onnx`` and ``onnx-training`` have in common: a model for each program."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir

from sam_export.artifact.contract import ProgramSpec, discarded_if_not_finite
from sam_export.artifact.folder import Lowered, LoweredFile
from sam_export.errors import LoweringError
from sam_export.lower.draws import random_details
from sam_export.lower.onnx_cuda import select_update, sizes_on_device
from sam_export.lower.onnx_cuda_kernels import cuda_tables, refuse_without_cuda_kernel
from sam_export.lower.onnx_graph import IR_VERSION, OPSET, onnx_model
from sam_export.lower.onnx_guard import guard_update
from sam_export.lower.onnx_in_place import in_place
from sam_export.lower.onnx_ops.table import Tables
from sam_export.lower.onnx_random import random_inputs
from sam_export.lower.onnx_training_nodes import check_training_nodes
from sam_export.lower.result import lowered
from sam_export.tracing.captured_step import CapturedStep

PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy")
"""Those whose versions shape an ONNX model."""


def refuse(captured: CapturedStep, device: str) -> None:
    """Refuses a step that no ONNX model can hold.

    Raises:
        LoweringError: It draws from torch's generator, has kernels that ONNX lacks, or computes in
            bfloat16 where no kernel does.
    """
    if captured.contract.autocast == "bfloat16" and device == "cpu":
        raise LoweringError(
            "The step casts to bfloat16 (autocast=torch.bfloat16), and ONNX Runtime's CPU has no "
            "kernels for it. Use autocast=torch.float16 with loss_scaling=LossScaling(), or a "
            "torch target."
        )
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


def lower_with(captured: CapturedStep, target: str, tables: Tables, device: str = "cpu") -> Lowered:
    """The programs of a step as ONNX models, opset 18, IR version 10.

    All state is graph inputs; ``details["in_place"]`` says for every state tensor that changes
    whether it may be overwritten in place (``""``) or why not, and
    ``details["random_numbers"]["inputs"]`` which inputs of random words the session fills.

    Args:
        captured: The step.
        target: Name of the target.
        tables: What operators are written with.
        device: ``cpu`` or ``cuda``: what the models are meant for. Those for ``cuda`` run on the
            CPU too, a little slower; see `onnx_cuda`.

    Raises:
        LoweringError: The step draws from torch's generator, or an operator has no ONNX form, or
            no kernel on the device.
    """
    refuse(captured, device)
    if device == "cuda":
        tables = cuda_tables(tables)
    files: dict[str, LoweredFile] = {}
    details: dict[str, Any] = {
        "opset": OPSET, "ir_version": IR_VERSION, "device": device, "in_place": {}
    }  # fmt: skip
    drawn: dict[str, Any] = {}
    for spec in captured.contract.programs:
        _refuse_derived_sizes(captured, spec)
        program = captured.programs[spec.name]
        model = onnx_model(program, spec, captured.contract, tables)
        drawn[spec.name] = random_inputs(program, spec, captured.contract)
        if device == "cuda":
            on_host = sizes_on_device(model)
            refuse_without_cuda_kernel(model, spec, target, program, on_host)
        if spec.feeds:
            discarded = discarded_if_not_finite(spec, captured.semantics)
            if discarded and device == "cuda":
                select_update(model, spec, discarded)
            elif discarded:
                guard_update(model, spec, discarded)
            # What one program may not overwrite has two buffers, for all of them.
            for state, reason in in_place(model, spec).items():
                details["in_place"][state] = details["in_place"].get(state) or reason
        name = f"{spec.name}.onnx"
        files[spec.name] = LoweredFile(name, checked(name, ir.to_proto(model)))
    details |= random_details(captured, made_by="session")
    if "random_numbers" in details:
        details["random_numbers"]["inputs"] = drawn
    return lowered(captured, target, files, details, PACKAGES)


def checked(name: str, proto: onnx.ModelProto, infer: bool = True) -> bytes:
    """A model as the bytes of its file.

    Args:
        name: Of the file.
        proto: The model.
        infer: Whether ONNX's shape inference has to agree with all that is declared.

    Raises:
        LoweringError: It is not valid.
    """
    check_training_nodes(proto)
    try:
        onnx.checker.check_model(proto, full_check=infer)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise LoweringError(f"{name} became an ONNX graph that is not valid: {error}") from error
    return bytes(proto.SerializeToString(deterministic=True))


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
