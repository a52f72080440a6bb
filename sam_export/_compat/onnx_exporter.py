"""torch's ONNX exporter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch

from sam_export._compat.origins import origin_of


def to_onnx(
    program: torch.export.ExportedProgram,
    inputs: list[str],
    outputs: list[str],
    opset: int,
    forms: dict[Any, Callable[..., Any]],
) -> Any:
    """torch's ONNX translation of a program, with our own forms; an `onnx_ir.Model`.

    The exporter's rewriting passes stay off: they cost more time than the translation.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # "torchvision is not installed", once per missing package
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                custom_translation_table=forms,
                optimize=False,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert exported is not None
    return exported.model


def without_onnx_form(
    program: torch.export.ExportedProgram, forms: dict[Any, Callable[..., Any]]
) -> dict[str, tuple[int, str]]:
    """Schema of every operator that neither we nor the exporter can translate: count, origin.

    Only called once an export has failed, to say what is missing; the exporter stops at the first.
    """
    from torch.onnx._internal.exporter import _decomp, _registration

    registry = _registration.ONNXRegistry.from_torchlib()
    for target, function in forms.items():
        registry.register_op(target, function)
    known = {*_decomp.get_onnx_implemented_overloads(registry), *forms}
    table = _decomp.create_onnx_friendly_decomposition_table(known)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = program.run_decompositions(table)
    missing: dict[str, tuple[int, str]] = {}
    for node in program.graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and not registry.is_registered(target):
            count, origin = missing.get(str(target._schema), (0, origin_of(node)))
            missing[str(target._schema)] = (count + 1, origin)
    return missing
