"""Pieces of a step in ONNX, and which of its values are nodes of the captured graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper
from torch import Tensor

from sam_export._compat import origins
from sam_export.artifact.contract import discarded_if_not_finite
from sam_export.errors import ParityError
from sam_export.lower.onnx_graph import Provenance, onnx_model
from sam_export.lower.onnx_guard import guard_update
from sam_export.lower.onnx_ops import PORTABLE
from sam_export.lower.onnx_ops.table import Tables
from sam_export.lower.onnx_random import random_inputs
from sam_export.parity.interpret import StepGraph, leaves, run_nodes
from sam_export.runtime.detect import require_onnxruntime
from sam_export.runtime.ort_session import FLOAT32_FUSIONS
from sam_export.tracing.randomness import drawn_nodes

LEVELS = ("DISABLE_ALL", "BASIC", "EXTENDED", "ALL")
"""ONNX Runtime's levels of graph optimization; sessions use the last one."""

_CLOSE = 1e-2
"""Part of a value by which an intermediate result may be off and still be that value.

It only has to tell results of one operator from each other: the search compares them exactly.
"""


class OnnxForm:
    """The step of an ONNX artifact, with the update branch that eager's step takes laid open.

    The step is lowered once more to learn which value is which node; the names in the artifact are
    the same ones.

    Args:
        graph: The captured step with eager's values.
        file: ``step.onnx``; None: as this version lowers it.
        target: ``onnx`` or ``onnx-training``.

    Attributes:
        values: See `locate_search.Form`.
        ways: `LEVELS`.
        fresh: The model as this version lowers it.
        model: The model that is searched.
    """

    ways = LEVELS

    def __init__(self, graph: StepGraph, file: Path | None, target: str) -> None:
        self.graph = graph
        provenance = Provenance()
        self.fresh = _lowered(graph, _tables(target), provenance)
        self.model = self.fresh if file is None else onnx.load(str(file))
        self._parts = _Parts(self.model.graph, graph.is_finite)
        self.names = dict(graph.inputs_by_node)
        drawn = random_inputs(graph.program, graph.spec, graph.captured.contract)
        for node, item in zip(drawn_nodes(graph.program.graph), drawn, strict=True):
            self.names[node.name] = item["input"]
        self.names |= _matched(graph, provenance)
        self.names |= {node: output for output, node in reversed(graph.results.items())}
        self.names = {n: v for n, v in self.names.items() if v in self._parts.known}
        self._nodes = {value: node for node, value in self.names.items()}
        self.values = list(self.names)
        self.is_double = any(i.dtype == "float64" for i in graph.captured.contract.state)

    def readers(self, name: str, known: Callable[[str], bool]) -> set[str]:
        """See `locate_search.Form`."""
        found: set[str] = set()
        seen: set[str] = set()
        pending = list(self._parts.users[self.names[name]])
        while pending:
            value = pending.pop()
            node = self._nodes.get(value)
            if node is not None and known(node):
                found.add(node)
            elif value not in seen:
                seen.add(value)
                pending.extend(self._parts.users[value])
        return found

    def run(
        self, wanted: Sequence[str], given: Mapping[str, Tensor], way: str = ""
    ) -> dict[str, NDArray[Any]]:
        """See `locate_search.Form`."""
        model, inputs = self.piece(wanted, given)
        results = run_model(model, inputs, way or self.ways[-1], self.is_double)
        return dict(zip(wanted, results, strict=True))

    def piece(
        self, wanted: Sequence[str], given: Mapping[str, Tensor], fresh: bool = False
    ) -> tuple[ModelProto, dict[str, NDArray[Any]]]:
        """A model that computes ``wanted`` from ``given``, and its inputs.

        Args:
            wanted: Names of nodes of the captured graph.
            given: Values by such names.
            fresh: Of the model as this version lowers it.
        """
        parts = _Parts(self.fresh.graph, self.graph.is_finite) if fresh else self._parts
        ends = {self.names[node]: node for node in given if node in self.names}
        nodes, read = parts.between([self.names[node] for node in wanted], ends)
        missing = [value for value in read if value not in ends and value not in parts.constants]
        if missing:
            raise ParityError(
                f"{', '.join(missing[:3])} is read by the step and written by nothing; the file is "
                "not a graph that sam_export wrote."
            )
        inputs = {value: given[ends[value]].numpy() for value in read if value in ends}
        made = GraphProto(name="piece")
        made.node.extend(nodes)
        made.initializer.extend(parts.constants[v] for v in read if v not in ends)
        for value in inputs:
            made.input.append(self._info(value, ends[value]))
        for node in wanted:
            made.output.append(self._info(self.names[node], node))
        inside = {value for node in nodes for value in node.output}
        kept = inside - {self.names[node] for node in wanted}
        made.value_info.extend(v for n, v in parts.infos.items() if n in kept)
        model = ModelProto(
            graph=made,
            ir_version=self.model.ir_version,
            opset_import=self.model.opset_import,
            producer_name="sam_export",
        )
        return model, inputs

    def _info(self, value: str, node: str) -> onnx.ValueInfoProto:
        eager = self.graph.values[node]
        sizes = self.graph.nodes[node].meta["val"].shape
        shape = [size if isinstance(size, int) else str(size) for size in sizes]
        return helper.make_tensor_value_info(value, _element(eager), shape)


def run_model(
    model: ModelProto, inputs: Mapping[str, NDArray[Any]], level: str, is_double: bool
) -> list[NDArray[Any]]:
    """The outputs of a model in ONNX Runtime on the CPU, optimized up to one of `LEVELS`.

    Raises:
        ParityError: ONNX Runtime does not load it.
    """
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    prefix = "ORT_" if level == "DISABLE_ALL" else "ORT_ENABLE_"
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, prefix + level)
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = ort.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(FLOAT32_FUSIONS) if is_double else [],
        )
        results: list[NDArray[Any]] = session.run(None, dict(inputs))
    except Exception as error:  # onnxruntime's own, which derive from nothing narrower
        names = ", ".join(output.name for output in model.graph.output[:3])
        raise ParityError(
            f"ONNX Runtime does not run the piece that computes {names}: {error}"
        ) from (error)
    return results


class _Parts:
    """The nodes of a graph by what they write, with the taken branch of the update's ``If``."""

    def __init__(self, graph: GraphProto, is_finite: bool) -> None:
        self.nodes = list(_laid_open(graph, is_finite))
        self.constants = {item.name: item for item in graph.initializer}
        self.infos = {item.name: item for item in graph.value_info}
        for node in graph.node:
            for branch in _subgraphs(node) if node.op_type == "If" else ():
                self.constants |= {item.name: item for item in branch.initializer}
                self.infos |= {item.name: item for item in (*branch.value_info, *branch.output)}
        self.writer = {value: i for i, n in enumerate(self.nodes) for value in n.output if value}
        self.users: dict[str, list[str]] = defaultdict(list)
        for node in self.nodes:
            for value in reads(node):
                self.users[value] += [output for output in node.output if output]
        self.known = {*self.writer, *(value.name for value in graph.input)}

    def between(
        self, wanted: Sequence[str], ends: Mapping[str, str]
    ) -> tuple[list[NodeProto], list[str]]:
        """The nodes that compute ``wanted``, and what they read that none of them writes."""
        chosen: set[int] = set()
        read: dict[str, None] = {}
        pending = list(wanted)
        while pending:
            value = pending.pop()
            place = self.writer.get(value)
            if value in ends or place is None:
                read[value] = None
            elif place not in chosen:
                chosen.add(place)
                pending.extend(reads(self.nodes[place]))
        return [self.nodes[place] for place in sorted(chosen)], sorted(read)


def _laid_open(graph: GraphProto, is_finite: bool) -> Iterator[NodeProto]:
    """The nodes of a graph with those of the branch that the update's ``If`` takes in its place."""
    for node in graph.node:
        branches = {a.name: a.g for a in node.attribute if a.type == AttributeProto.GRAPH}
        if node.op_type != "If" or node.name != "update/If":
            yield node
            continue
        branch = branches["then_branch" if is_finite else "else_branch"]
        yield from branch.node
        for inner, outer in zip(branch.output, node.output, strict=True):
            yield helper.make_node("Identity", [inner.name], [outer], name=f"{node.name}/{outer}")


def reads(node: NodeProto) -> list[str]:
    """Names of the values that a node reads, those that its subgraphs take from outside too."""
    names = {name: None for name in node.input if name}
    for graph in _subgraphs(node):
        own = {item.name for item in (*graph.input, *graph.initializer)}
        own |= {value for inner in graph.node for value in inner.output}
        used = [name for inner in graph.node for name in reads(inner)]
        used += [item.name for item in graph.output]
        names |= {name: None for name in used if name not in own}
    return list(names)


def _subgraphs(node: NodeProto) -> list[GraphProto]:
    return [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]


def _element(value: Tensor) -> int:
    return int(helper.np_dtype_to_tensor_dtype(value.numpy().dtype))


# -- which value is which node ------------------------------------------------------------------


def _tables(target: str) -> Tables:
    if target == "onnx":
        return PORTABLE
    from sam_export.lower.onnx_training_ops import TRAINING

    return TRAINING


def _lowered(graph: StepGraph, tables: Tables, provenance: Provenance) -> ModelProto:
    contract = graph.captured.contract
    model = onnx_model(graph.program, graph.spec, contract, tables, provenance)
    discarded = discarded_if_not_finite(graph.spec, graph.captured.semantics)
    if discarded:
        guard_update(model, graph.spec, discarded)
    return ir.to_proto(model)


def _matched(graph: StepGraph, provenance: Provenance) -> dict[str, str]:
    """Captured node to ONNX value, by what the exporter made for which node.

    A captured operator may become several, and not even the last of them has to be its result. So
    what was made for a node is run, and is that node's value where it is that number.
    """
    program = provenance.program
    assert program is not None
    values = _values_of(program, graph)
    made = {node: value for value, node in provenance.values.items()}
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        origin = graph.nodes.get(origins.numbered_as(node))
        if origin is None or node.name not in made or node.name not in values:
            continue
        users = [user for user in origin.users if user.name in graph.values]
        for captured in [origin] if origin.name in graph.values else users:
            if _is_same(values[node.name], graph.values[captured.name]):
                found[captured.name] = made[node.name]
    return found


def _values_of(program: torch.export.ExportedProgram, graph: StepGraph) -> dict[str, Any]:
    inputs = [graph.values[name] for name in graph.inputs.values()]
    known = leaves(program, inputs)
    for node in program.graph.nodes:
        if "onnx_symbolic" in str(node.target):  # the place of a draw
            known[node.name] = graph.values[origins.numbered_as(node)]
    return run_nodes(program.graph.nodes, known, False)


def _is_same(one: Any, other: Tensor) -> bool:
    if not isinstance(one, Tensor) or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=_CLOSE, atol=_CLOSE * _typical(other), equal_nan=True)


def _typical(value: Tensor) -> float:
    finite = value[torch.isfinite(value)].double()
    return float(finite.square().mean().sqrt()) if finite.numel() else 0.0
