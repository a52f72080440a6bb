"""Additions with a factor, written as Inductor computes them right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from sam_export._compat.program import inserted, returning

_ADD = torch.ops.aten.add.Tensor


def without_factors(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """``program`` with ``add(a, b, alpha)`` as ``a + alpha * b``.

    Inductor replaces ``add(mm(x, y), b, alpha)`` and ``add(b, mm(x, y), alpha)`` by ``addmm(b, x,
    y)`` and drops ``alpha``: https://github.com/pytorch/pytorch/issues/167313 is the same fault in
    another pattern. Weight decay is such an addition, and the gradient of a linear layer's weight
    such a product. What it makes of the two operators is what it makes of the one elsewhere.
    """
    if not any(_has_factor(node) for node in program.graph.nodes):
        return program

    def rewritten(
        graph: fx.Graph, inputs: Sequence[fx.Node], results: Sequence[fx.Node]
    ) -> Sequence[fx.Node]:
        for node in filter(_has_factor, list(graph.nodes)):
            first, second = node.args
            product = inserted(graph, node, torch.ops.aten.mul.Tensor, second, node.kwargs["alpha"])
            node.args, node.kwargs = (first, product), {}
        return results

    return returning(program, rewritten)


def _has_factor(node: fx.Node) -> bool:
    if node.target is not _ADD or node.kwargs.get("alpha", 1) == 1:
        return False
    # A product of another dtype than the sum's is none that Inductor takes for a matrix product's
    # bias; and the factor would be rounded to that dtype.
    second = node.args[1]
    return isinstance(second, fx.Node) and second.meta["val"].dtype == node.meta["val"].dtype
