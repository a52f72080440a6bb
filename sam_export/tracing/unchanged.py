"""State that a program leaves as it is, or has no use for."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from sam_export.artifact.contract import NEXT


def drop_unchanged(
    graph_module: torch.fx.GraphModule,
    inputs: Sequence[str],
    outputs: Sequence[str],
    unread: set[str],
    spare: Collection[str] = (),
) -> tuple[list[bool], set[str]]:
    """Removes new-state outputs that are just their input, and state that is of no use.

    Args:
        graph_module: It is changed.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        unread: State to remove, input and output.
        spare: Inputs to remove if the graph does not read them.

    Returns:
        For every output, whether it is kept; and the names of the inputs that were removed.
    """
    graph = graph_module.graph
    placeholders = dict(zip(inputs, graph.find_nodes(op="placeholder"), strict=True))
    (result,) = graph.find_nodes(op="output")

    def is_new(name: str, value: torch.fx.Node) -> bool:
        state = name[len(NEXT) :]
        return state not in unread and value is not placeholders[state]

    kept = [
        not name.startswith(NEXT) or is_new(name, value)
        for name, value in zip(outputs, result.args[0], strict=True)
    ]
    result.args = ([value for value, keep in zip(result.args[0], kept, strict=True) if keep],)
    graph.eliminate_dead_code()
    fed = {name[len(NEXT) :] for name, keep in zip(outputs, kept, strict=True) if keep}
    removed = unread & placeholders.keys()
    removed |= {n for n in spare if not placeholders[n].users and n not in fed}
    for name in removed:
        graph.erase_node(placeholders[name])
    graph_module.recompile()
    return kept, removed
