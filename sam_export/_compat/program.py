"""An exported program that returns other nodes of its graph than it was captured with."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.export.graph_signature import (
    ExportGraphSignature,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

Chosen = Callable[[fx.Graph, Sequence[fx.Node], Sequence[fx.Node]], Sequence[fx.Node]]
"""(graph, its user inputs, its results) to the nodes that are to be the results."""


def returning(
    program: torch.export.ExportedProgram, chosen: Chosen
) -> torch.export.ExportedProgram:
    """A copy of ``program`` whose results are what ``chosen`` picks or adds in its graph.

    Exporting a changed graph module again does the same; it takes seconds, and example inputs.

    Args:
        program: A functional program; it is not changed.
        chosen: Picks the results; it may add nodes by `appended`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # pytree's, about its own LeafSpec
        return _returning(program, chosen)


def _returning(
    program: torch.export.ExportedProgram, chosen: Chosen
) -> torch.export.ExportedProgram:
    module = copy.deepcopy(program.graph_module)
    graph = module.graph
    given = set(program.graph_signature.user_inputs)
    inputs = [node for node in graph.find_nodes(op="placeholder") if node.name in given]
    end = graph.output_node()
    results = list(chosen(graph, inputs, list(end.args[0])))  # type: ignore[arg-type]
    end.args = (tuple(results),)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    graph.lint()
    module.recompile()
    old = program.graph_signature
    outputs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results
    ]
    signature = ExportGraphSignature(list(old.input_specs), outputs)
    calls = [copy.deepcopy(call) for call in program.module_call_graph if call.fqn == ""]
    changed: torch.export.ExportedProgram = program._update(  # type: ignore[no-untyped-call]
        module, signature
    )
    # The way back to the caller's own structure: here a flat tuple of as many as there are.
    for call in calls:
        if call.signature is not None:
            spec = torch.utils._pytree.tree_structure(tuple(0 for _ in results))
            call.signature.outputs = []  # by name; a decomposition may rename a result
            call.signature.out_spec = spec
    changed._module_call_graph = calls
    return changed


def appended(graph: fx.Graph, target: Any, *arguments: Any, **named: Any) -> fx.Node:
    """A new node before the end of ``graph``, with the shape and dtype that it will have."""
    return inserted(graph, graph.output_node(), target, *arguments, **named)


def inserted(
    graph: fx.Graph, before: fx.Node, target: Any, *arguments: Any, **named: Any
) -> fx.Node:
    """A new node before another one, with the shape and dtype that it will have."""
    with graph.inserting_before(before):
        node = graph.call_function(target, arguments, named)

    renewed(node)
    return node


def renewed(node: fx.Node) -> None:
    """Finds shape and dtype of a node again, after its arguments have changed."""

    def value(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda item: item.meta["val"])

    known = node.all_input_nodes or node.graph.find_nodes(op="placeholder")
    fakes = [item.meta["val"] for item in known]
    mode = detect_fake_mode(fakes)
    assert mode is not None
    with mode:
        node.meta["val"] = node.target(*value(node.args), **value(node.kwargs))  # type: ignore[operator]
