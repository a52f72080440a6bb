"""What onnxruntime-training's own operators may look like, checked before a model is written.

ONNX's checker does not know them, and ONNX Runtime 1.19.2 ends the process, with no message, where
a node has too many outputs or a result whose type nobody declared.

Source: `onnxruntime/orttraining/orttraining/core/graph/training_op_defs.cc` of 1.19.2; every entry
is run by the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import onnx
import onnx_ir as ir

from sam_export.errors import LoweringError

TRAINING_DOMAIN = "com.microsoft"

_KINDS = onnx.AttributeProto
_NONE: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Signature:
    """How an operator is called.

    Attributes:
        inputs: How many it has, all of which must be there.
        outputs: How many it has at most.
        attributes: Name to the number of its kind in ONNX; none has to be there.
        optional: How many further inputs it may have.
        computes_named: Whether it leaves out an output that has no name.
    """

    inputs: int
    outputs: int
    attributes: Mapping[str, int] = field(default_factory=lambda: _NONE)
    optional: int = 0
    computes_named: bool = False


_AXIS = {"axis": _KINDS.INT}
_EPSILON = {"epsilon": _KINDS.FLOAT}

SIGNATURES: dict[str, Signature] = {
    "ConvGrad": Signature(
        3,
        3,
        {
            "kernel_shape": _KINDS.INTS,
            "strides": _KINDS.INTS,
            "pads": _KINDS.INTS,
            "dilations": _KINDS.INTS,
            "group": _KINDS.INT,
        },
        computes_named=True,
    ),
    "BatchNormInternal": Signature(
        5, 5, {**_EPSILON, "momentum": _KINDS.FLOAT, "training_mode": _KINDS.INT}
    ),
    "BatchNormalizationGrad": Signature(5, 3, _EPSILON),
    "LayerNormalizationGrad": Signature(5, 3, _AXIS),
    "SoftmaxGrad_13": Signature(2, 1, _AXIS),
    "SigmoidGrad": Signature(2, 1),
    "TanhGrad": Signature(2, 1),
    "GatherElementsGrad": Signature(3, 1, _AXIS),
    "InPlaceAccumulatorV2": Signature(2, 2, optional=1),
    "SGDOptimizerV2": Signature(3, 2, optional=1),
    "AdamWOptimizer": Signature(
        6,
        5,
        {
            **_EPSILON,
            "alpha": _KINDS.FLOAT,
            "beta": _KINDS.FLOAT,
            "weight_decay": _KINDS.FLOAT,
            "correct_bias": _KINDS.INT,
            "adam_mode": _KINDS.INT,
        },
        optional=1,
    ),
}
"""Operator of `TRAINING_DOMAIN` to how it is called."""


def check_training_nodes(model: onnx.ModelProto) -> None:
    """Checks every node that is not of ONNX's own domain, in subgraphs too.

    Raises:
        LoweringError: A node would not load, or would end the process; with its name.
    """
    versions = {item.domain: item.version for item in model.opset_import}
    if versions.get(TRAINING_DOMAIN, 1) != 1:
        raise LoweringError(f"{TRAINING_DOMAIN} is imported in version {versions[TRAINING_DOMAIN]}")
    for graph in _graphs(model.graph):
        declared = {
            value.name
            for value in (*graph.input, *graph.output, *graph.value_info)
            if value.type.WhichOneof("value") != "tensor_type"
            or (value.type.tensor_type.elem_type and value.type.tensor_type.HasField("shape"))
        }
        for node in graph.node:
            if node.domain:
                _check(node, declared, TRAINING_DOMAIN in versions)


def name_only_what_is_read(model: ir.Model) -> None:
    """Takes the name of every output that nobody reads, where the operator then leaves it out."""
    for node in model.graph:
        signature = SIGNATURES.get(node.op_type) if node.domain == TRAINING_DOMAIN else None
        if signature is not None and signature.computes_named:
            for value in node.outputs:
                if not value.uses() and not value.is_graph_output():
                    value.name = ""


def _check(node: onnx.NodeProto, declared: set[str], imported: bool) -> None:
    signature = SIGNATURES.get(node.op_type) if node.domain == TRAINING_DOMAIN else None
    if signature is None or not imported:
        problem = "is not an operator that this target may use"
    elif not signature.inputs <= len(node.input) <= signature.inputs + signature.optional:
        problem = f"has {len(node.input)} inputs, not {signature.inputs}"
    elif "" in node.input:
        problem = f"lacks its input {list(node.input).index('')}"
    elif not 0 < len(node.output) <= signature.outputs or not any(node.output):
        problem = f"has {len(node.output)} outputs, not 1 to {signature.outputs}"
    else:
        problem = ""
        for attribute in node.attribute:
            wanted = signature.attributes.get(attribute.name)
            if wanted is None or wanted != attribute.type:
                problem = f"has an attribute {attribute.name!r} of kind {attribute.type}"
        bare = [name for name in node.output if name and name not in declared]
        if bare:
            problem = f"has the output {bare[0]!r}, whose dtype and shape are not declared"
    if problem:
        raise LoweringError(
            f"The node {node.name!r} ({node.domain}::{node.op_type}) {problem}; ONNX Runtime might "
            "end the process on it."
        )


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == _KINDS.GRAPH:
                yield from _graphs(attribute.g)
