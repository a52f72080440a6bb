"""From one captured program to an ONNX graph with readable names."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from sam_export._compat import onnx_exporter, origins
from sam_export.artifact.contract import ProgramSpec, StepContract, TensorSpec
from sam_export.errors import LoweringError
from sam_export.lower.float16_rounding import rounding_to_float16
from sam_export.lower.mixed_norms import norms_in_float32
from sam_export.lower.onnx_ops import PORTABLE
from sam_export.lower.onnx_ops.table import Tables
from sam_export.lower.onnx_passes import simplify
from sam_export.lower.onnx_random import DRAWS_AS_PLACES, draws_as_inputs
from sam_export.lower.onnx_refusal import Refusals, refusal
from sam_export.lower.onnx_sizes import sizes_in_float64
from sam_export.lower.onnx_training_nodes import name_only_what_is_read

OPSET = 18
"""Newer opsets lack CUDA kernels in onnxruntime-training 1.19.2 and fall back to the CPU."""

IR_VERSION = 10
"""The newest that onnxruntime-training 1.19.2 loads."""


@dataclass
class Provenance:
    """Which value of an ONNX graph is which node of the captured one; filled by `onnx_model`.

    It costs time, so only who looks for a difference asks for it. A model is the same with it.

    Attributes:
        program: The program in the operators that were translated. Its nodes know by
            `origins.numbered_as` which captured node they were made for.
        values: Name of an ONNX value to the name of the node of ``program`` that it is.
    """

    program: torch.export.ExportedProgram | None = None
    values: dict[str, str] = field(default_factory=dict)


def onnx_model(
    program: torch.export.ExportedProgram,
    spec: ProgramSpec,
    contract: StepContract,
    tables: Tables = PORTABLE,
    provenance: Provenance | None = None,
) -> ir.Model:
    """One program as an ONNX model, in standard operators unless ``tables`` have others.

    Inputs and outputs are named and typed as the contract says, random inputs follow (see
    `onnx_random`); nodes are named after the stage and the module they come from
    (``ascent/conv1/Conv``).

    Raises:
        LoweringError: An operator has no ONNX form, or only for other arguments.
    """
    program = norms_in_float32(program)
    if not tables.has_float16:
        program = rounding_to_float16(program)
    own = {**tables.own_decompositions, **DRAWS_AS_PLACES}
    reasons: dict[Any, str] = {}
    with origins.numbered(program.graph if provenance else None):
        program = onnx_exporter.decomposed(
            program, OPSET, tables.forms, tables.decomposed, own, reasons, LoweringError
        )
    sizes_in_float64(program)
    missing = [(node, "") for node in onnx_exporter.without_form(program, OPSET, tables.forms)]
    missing = [pair for pair in missing if pair[0].target not in reasons]
    missing += [(n, reasons[n.target]) for n in program.graph.nodes if n.target in reasons]
    for node in program.graph.nodes:
        # The exporter writes the module stack into each ONNX node; it carries our origin there.
        node.meta["nn_module_stack"] = {"origin": (origins.origin_of(node), "sam_export")}
    refusals = Refusals(program, tables.forms)
    outputs = [output.name for output in spec.outputs]
    if missing:
        raise refusal(spec.name, missing)
    try:
        model = onnx_exporter.to_onnx(program, list(spec.inputs), outputs, OPSET, refusals.forms)
    except Exception as error:
        if not refusals.found:
            raise _explained(error, spec) from error
    if refusals.found:
        raise refusal(spec.name, refusals.found)
    model.ir_version = IR_VERSION
    drawn = draws_as_inputs(model)
    simplify(model)
    _own_outputs(model.graph, spec.inputs, outputs)
    made = {value: value.name for node in model.graph for value in node.outputs}
    _name(model)
    if provenance is not None:
        provenance.program = program
        provenance.values = {str(value.name): str(name) for value, name in made.items()}
    name_only_what_is_read(model)
    inputs = [value for value in model.graph.inputs if value not in drawn]
    _declare(inputs, contract.inputs_of(spec))
    _declare(model.graph.outputs, spec.outputs)
    return model


def _own_outputs(graph: ir.Graph, inputs: tuple[str, ...], names: list[str]) -> None:
    """An output that is an input, a constant or another output gets a node and a name of its own.

    The exporter gives such an input, or other output, the output's name.
    """
    for value, name in zip(graph.inputs, inputs, strict=False):  # then come random words
        if any(value is output for output in graph.outputs):
            value.name = name
    seen: set[ir.Value] = set()
    for index, (value, name) in enumerate(zip(list(graph.outputs), names, strict=True)):
        again = value in seen
        if not again and value.producer() is not None:
            value.name = name
        seen.add(value)
        if again or value.producer() is None:
            copy = ir.node("Identity", [value])
            copy.outputs[0].name = name
            if value.is_initializer():
                value.name = f"value/{name}"
            graph.append(copy)
            graph.outputs[index] = copy.outputs[0]


def _name(model: ir.Model) -> None:
    """``origin/Op``, ``origin/Op_1``, ...; a value is called like its node."""
    graph = model.graph
    fixed = {value.name for value in (*graph.inputs, *graph.outputs)}
    counts: Counter[str] = Counter()
    for node in graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']")
        origin = ast.literal_eval(scopes)[0]
        origin = "" if origin.startswith("_empty") else origin  # nodes that export adds itself
        base = "/".join(part for part in (origin, node.op_type) if part)
        node.name = f"{base}_{counts[base]}" if counts[base] else base
        counts[base] += 1
        for index, value in enumerate(node.outputs):
            if value.name not in fixed:
                value.name = f"{node.name}.{index}" if index else node.name
        node.metadata_props.clear()
        node.doc_string = None
    for index, (name, value) in enumerate(list(graph.initializers.items())):
        graph.initializers.pop(name)
        value.name = f"constant_{index}"
        graph.initializers[value.name] = value
    for value in (*graph.inputs, *graph.outputs):
        value.metadata_props.clear()
    model.metadata_props.clear()
    graph.metadata_props.clear()
    graph.doc_string = None
    model.producer_name, model.producer_version = "sam_export", ""
    graph.name = "sam_step"


def _declare(values: list[ir.Value], specs: tuple[TensorSpec, ...]) -> None:
    for value, spec in zip(values, specs, strict=True):
        if value.name != spec.name:
            raise LoweringError(
                f"The exporter made {value.name!r} where the contract has {spec.name!r}; "
                "names of parameters and inputs must be unique."
            )
        value.dtype = ir.DataType.from_numpy(np.dtype(spec.dtype))
        value.shape = ir.Shape(spec.shape)


def _explained(error: Exception, spec: ProgramSpec) -> LoweringError:
    text = str(error).strip().splitlines()
    cause = error.__cause__ or error
    return LoweringError(
        f"Program {spec.name!r} cannot be exported to ONNX: {text[0] if text else ''} "
        f"({type(cause).__name__}: {cause})"
    )
