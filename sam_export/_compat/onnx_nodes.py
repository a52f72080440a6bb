"""An ONNX node with a subgraph, written while a form of ours runs.

onnxscript's evaluator counts the outputs of a ``Scan`` from an ONNX message, not from an `onnx_ir`
graph; torch's exporter has this for its own control flow. `onnxscript.opset18.Scan` replaces it
once that takes an `onnx_ir.Graph`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from torch.onnx._internal.exporter._torchlib.ops.hop import call_op


def scan(inputs: Sequence[ir.Value], body: ir.Graph, **attributes: Any) -> Sequence[ir.Value]:
    """``Scan`` over ``inputs``; its results are those of ``body``."""
    results: Sequence[ir.Value] = call_op(
        "Scan", *inputs, _num_outputs=len(body.outputs), body=body, **attributes
    )
    return results


def node(
    domain: str, name: str, *inputs: ir.Value | None, count: int, **attributes: Any
) -> Sequence[ir.Value]:
    """One node of a domain whose operators onnxscript has no schema of, version 1 of it."""
    results: Sequence[ir.Value] = call_op(
        name, *inputs, _num_outputs=count, _domain=domain, **attributes
    )
    writer = results[0].producer()
    assert writer is not None
    writer.version = 1
    return results
