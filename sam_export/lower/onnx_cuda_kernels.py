"""Operators that ONNX Runtime has no CUDA kernel for, and what becomes of a step that needs one.

The tables hold what our lowerings can write: every operator, in its dtypes, of the graphs of all
``models/`` and of all rows of ``tests/lower/op_table.py``, for both targets, at opset 18. Each was
put into a graph of its own, and the CUDA provider of the runtime was asked whether it takes it
(by the very wheels from PyPI, over stand-ins for NVIDIA's libraries, since placement needs no
device). What is not listed has a kernel. None of the operators of ``com.microsoft`` that
`onnx_training_ops` writes lacks one, so no training form has to give way on CUDA. The bitwise ones
come up where a graph makes its own random numbers, which only ``ort-artifacts`` asks for.

Some are avoided: elementary functions become arithmetic, as they do in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import onnx_ir as ir
import torch

from sam_export._compat import origins
from sam_export.artifact.contract import ProgramSpec
from sam_export.errors import LoweringError
from sam_export.lower.onnx_ops.float64_functions import IN_EVERY_DTYPE
from sam_export.lower.onnx_ops.table import Tables, overload

ANY = frozenset({"*"})

_ELEMENTARY = ("acos", "acosh", "asin", "asinh", "atan", "atanh", "cosh", "sinh", "tan")

_BOTH: dict[str, frozenset[str]] = {
    **{name.capitalize(): ANY for name in _ELEMENTARY},
    "ArgMax": frozenset({"int32", "int64"}),
    "ArgMin": frozenset({"int32", "int64"}),
    "ReduceProd": frozenset({"int64"}),
    **dict.fromkeys(("BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor"), ANY),
}

NO_CUDA_KERNEL: Mapping[str, Mapping[str, frozenset[str]]] = {
    "onnxruntime-gpu 1.31.1": _BOTH,
    "onnxruntime-training 1.19.2": {**_BOTH, "ArgMax": ANY, "ArgMin": ANY},
}
"""Runtime to operator of ONNX to the dtypes of its first input that it has no CUDA kernel for."""

MEANT_FOR = {
    "onnx": "onnxruntime-gpu 1.31.1",
    "onnx-training": "onnxruntime-training 1.19.2",
    "ort-artifacts": "onnxruntime-training 1.19.2",
}
"""Target to the runtime whose kernels count."""


def cuda_tables(tables: Tables) -> Tables:
    """``tables``, with elementary functions as arithmetic where CUDA has no kernel for them."""
    own = {overload(f"aten::{name}"): IN_EVERY_DTYPE[f"aten::{name}"] for name in _ELEMENTARY}
    own_decompositions = {**tables.own_decompositions, **own}
    return replace(tables, own_decompositions=own_decompositions, has_float16=True)


def refuse_without_cuda_kernel(
    model: ir.Model,
    spec: ProgramSpec,
    target: str,
    program: torch.export.ExportedProgram,
    on_host: Iterable[ir.Node] = (),
) -> None:
    """Stops an export whose graph has an operator without a CUDA kernel.

    Args:
        model: The program in ONNX.
        spec: Its contract.
        target: Name of the target, which says for what runtime it is meant.
        program: The captured program, which knows the user's source lines.
        on_host: Nodes that compute sizes only, and so run on the CPU anyway.

    Raises:
        LoweringError: There is one; the message has operator, node, module and source line.
    """
    runtime = MEANT_FOR[target]
    spared = set(on_host)
    lines = []
    for node in _all_nodes(model.graph):
        lacking = NO_CUDA_KERNEL[runtime].get(node.op_type) if not node.domain else None
        if lacking is None or node in spared:
            continue
        dtype = _dtype(node)
        if lacking != ANY and dtype not in lacking:
            continue
        lines.append(f"  {node.op_type} of {dtype}: node {node.name!r}")
        at = _line(str(node.name), node.op_type, program)
        if at:
            lines.append(f"    at {at}")
    if lines:
        raise LoweringError(
            f"Program {spec.name!r} cannot stay on a CUDA device: {runtime} has no CUDA kernel "
            "for\n" + "\n".join(lines) + "\nCompute it otherwise in the model, use a torch target, "
            "or export for device='cpu' and load on CUDA with CudaOptions(allow_cpu_nodes=True)."
        )


def _all_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        yield node
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _all_nodes(attribute.as_graph())


def _dtype(node: ir.Node) -> str:
    first = node.inputs[0]
    if first is None or first.dtype is None:
        return "unknown dtype"
    return str(first.dtype.numpy())


def _line(name: str, op_type: str, program: torch.export.ExportedProgram) -> str:
    """The user's line of the captured nodes of the same module, best of the same operator."""
    origin = name.rpartition("/")[0]
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    own = [n for n in nodes if origins.origin_of(n) == origin and origins.line_of(n)]
    word = op_type.lower()
    same = [n for n in own if word in str(n.target).replace("_", "").lower()]
    return next(map(origins.line_of, (*same, *own)), "")
