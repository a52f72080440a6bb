"""Target ``ort-artifacts``: the files that onnxruntime-training's own API trains with.

The four files have the names and the layout of `onnxruntime.training.artifacts.generate_artifacts`,
so a program that uses that API (from Python, C, C++, C# or Java) takes the folder as it is and
trains with SAM without knowing it: both passes are inside ``training_model.onnx``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from sam_export.artifact.contract import HYPER, ProgramSpec, discarded_if_not_finite
from sam_export.artifact.folder import Lowered, LoweredFile
from sam_export.artifact.ort_layout import OrtLayout
from sam_export.errors import LoweringError
from sam_export.lower.draws import in_aten, random_details
from sam_export.lower.onnx_artifact import PACKAGES, checked, refuse
from sam_export.lower.onnx_cuda import sizes_on_device
from sam_export.lower.onnx_cuda_kernels import cuda_tables, refuse_without_cuda_kernel
from sam_export.lower.onnx_graph import IR_VERSION, OPSET, onnx_model
from sam_export.lower.onnx_ops.table import Tables
from sam_export.lower.onnx_training_ops import TRAINING
from sam_export.lower.ort_artifacts_plan import TrainingProgram, training_program
from sam_export.lower.ort_optimizer_model import optimizer_model
from sam_export.lower.ort_training_model import (
    BUFFER,
    RESET,
    evaluation_model,
    finish_training_model,
    stored_as_float32,
)
from sam_export.lower.result import lowered
from sam_export.tracing.captured_step import CapturedStep

TARGET = "ort-artifacts"

TRAINING_MODEL, EVAL_MODEL = "training_model.onnx", "eval_model.onnx"
OPTIMIZER_MODEL, CHECKPOINT = "optimizer_model.onnx", "checkpoint"
EVALUATE = "evaluate.onnx"
"""Not a file of the stock API: its evaluation model wants targets, `Session.evaluate` has none."""


def lower(captured: CapturedStep, device: str = "cpu") -> Lowered:
    """Training, evaluation and optimizer model, and a checkpoint; opset 18, IR version 10.

    ``details["layout"]`` says where each tensor is kept and what the gradient buffers hold
    (`artifact.ort_layout.OrtLayout`), ``details["update_in_training_model_because"]`` what the
    stock optimizer lacks, if anything (`ort_artifacts_plan.Plan`).

    Args:
        captured: The step.
        device: ``cpu`` or ``cuda``: what the models are meant for.

    Raises:
        LoweringError: The state is not float32, the step draws random numbers, an operator has no
            ONNX form, or no kernel on the device, or a state tensor cannot be written in place.
    """
    _refuse(captured, device)
    contract = captured.contract
    training = training_program(captured)
    plan, spec = training.plan, training.spec
    discarded = discarded_if_not_finite(contract.program("step"), captured.semantics)
    guarded = bool(discarded)
    parameters, frozen = _parameters(captured, training)
    fed = [item.name for item in contract.batch]
    buffers = [name + BUFFER for name in training.trained]

    # Nobody fills inputs of random words here, so the graph makes its numbers.
    tables = cuda_tables(TRAINING) if device == "cuda" else TRAINING
    program = in_aten(training.program)
    model = onnx_model(program, spec, contract, tables)
    if device == "cuda":
        on_host = sizes_on_device(model)
        refuse_without_cuda_kernel(model, spec, TARGET, program, on_host)
    for name in (*parameters, *frozen):
        _declare_input(model.graph, captured, name)
    finish_training_model(
        model,
        spec,
        plan,
        training.trained,
        [*fed, *parameters, *frozen, *buffers, RESET],
        [name for name in spec.feeds if name not in discarded],
        guarded,
        branch=device == "cpu",
    )
    written = list(spec.feeds.values())
    outputs = _evaluation(captured, "evaluate", tables)
    loss = _evaluation(captured, "evaluate_loss", tables)
    if device == "cuda":
        sizes_on_device(outputs)
        sizes_on_device(loss)
    stored_as_float32(outputs, written)
    stored_as_float32(loss, written)
    evaluate = ir.to_proto(outputs)
    for name in (*parameters, *frozen):
        _declare_input(loss.graph, captured, name, written)
    both = evaluation_model(loss, outputs, [*fed, *parameters, *frozen])
    protos = {
        TRAINING_MODEL: ir.to_proto(model),
        EVAL_MODEL: ir.to_proto(both),
        EVALUATE: evaluate,
        OPTIMIZER_MODEL: optimizer_model(plan, len(training.trained), guarded, device),
    }
    files = {
        name: LoweredFile(name, checked(name, proto, infer=name != OPTIMIZER_MODEL))
        for name, proto in protos.items()
    }
    layout = OrtLayout(
        tuple(parameters),
        tuple(frozen),
        tuple(written),
        plan.kind,
        plan.optimizer,
        tuple(float(plan.attributes[key]) for key in ("alpha", "beta") if key in plan.attributes),
    )
    hyper = {item.name: item.defaults for item in contract.hyper}
    checkpoint = layout.checkpoint(contract, captured.state, hyper).to_bytes()
    details = {
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "device": device,
        "layout": layout.to_dict(),
        "update_in_training_model_because": plan.reason,
        "known_rounding": layout.known_rounding(contract),
        **random_details(captured, made_by="graph"),
    }
    return lowered(
        captured,
        TARGET,
        {
            "step": files[TRAINING_MODEL],
            "evaluate": files[EVALUATE],
            "evaluate_loss": files[EVAL_MODEL],
        },
        details,
        (*PACKAGES, "flatbuffers"),
        (files[OPTIMIZER_MODEL], LoweredFile(CHECKPOINT, checkpoint)),
    )


def _refuse(captured: CapturedStep, device: str) -> None:
    refuse(captured, device)
    if captured.contract.every > 1:
        raise LoweringError(
            "The stock training API has one training model, and periodic SAM (every="
            f"{captured.contract.every}) two kinds of steps. Use the target 'onnx-training'."
        )
    if captured.contract.carried:
        raise LoweringError(
            "The stock training API runs both passes and the update at once; it has no stages to "
            "stand between. Capture without staged=True, or use the target 'onnx-training'."
        )
    if captured.contract.ema is not None:
        raise LoweringError(
            "The stock training API evaluates the weights that it trains, and has no place for an "
            f"average of them ({captured.contract.ema}). Use the target 'onnx-training'."
        )
    others = [
        f"{item.name} ({item.dtype})"
        for item in captured.contract.state
        if (item.role == "parameter" and item.dtype != "float32") or item.dtype == "float16"
    ]
    if others:
        raise LoweringError(
            "onnxruntime-training keeps gradients in float32 only, and no float16 in a checkpoint; "
            f"found {', '.join(others[:3])}. Export the model in float32, or use another target."
        )


def _parameters(captured: CapturedStep, training: TrainingProgram) -> tuple[list[str], list[str]]:
    """Names of the checkpoint's trained parameters, and of all else that it holds."""
    slots = [item.name for item in captured.contract.state if item.role == "slot"]
    in_optimizer = set(slots) if training.plan.kind == "gradient" else set()
    frozen = [
        item.name
        for item in captured.contract.state
        if item.name not in training.trained and item.name not in in_optimizer
    ]
    frozen += [HYPER + item.name for item in captured.contract.hyper if item.name != "lr"]
    if training.plan.kind == "parameters":
        frozen.append(HYPER + "lr")
    return list(training.trained), frozen


def _evaluation(captured: CapturedStep, name: str, tables: Tables) -> ir.Model:
    spec: ProgramSpec = captured.contract.program(name)
    return onnx_model(in_aten(captured.programs[name]), spec, captured.contract, tables)


def _declare_input(
    graph: ir.Graph, captured: CapturedStep, name: str, as_float32: Any = ()
) -> None:
    """Adds an input of the checkpoint that the program does not read; the API counts on all."""
    if any(value.name == name for value in graph.inputs):
        return
    contract = captured.contract
    specs = {item.name: item for item in (*contract.state, *contract.hyper_inputs)}
    dtype = "float32" if name in as_float32 else specs[name].dtype
    value = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype))),
        shape=ir.Shape(specs[name].shape),
    )
    graph.inputs.append(value)
