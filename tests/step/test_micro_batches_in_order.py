"""In a graph the parts of a batch come one after the other, whatever runs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sam_export as sx
from sam_export.step.micro_batches import waiting
from tests.step.test_micro_batches import PARTS, data, made


@pytest.mark.parametrize("value", [1.0, 0.0, float("nan"), float("inf"), -float("inf")])
def test_waiting_for_any_number_changes_nothing(value: float) -> None:
    """Also of integers, and where a gradient is not finite."""
    for whole in (torch.randn(6, 2), torch.arange(6)):
        parts = whole.unflatten(0, (3, 2)).unbind()
        for number, part in enumerate(parts):
            before = [torch.full((2, 2), value), torch.zeros((), dtype=torch.float64)]
            assert torch.equal(waiting(whole, part, number, before), part)


@pytest.mark.parametrize("per", ["batch", "micro_batch"])
def test_in_a_graph_each_part_waits_for_the_gradients_of_the_part_before(per: str) -> None:
    """Or a runtime holds the activations of all parts: ONNX Runtime runs all first passes first."""
    captured = sx.capture(made(micro_batches=PARTS, perturbation_per=per), data(1)[0])
    graph = captured.programs["step"].graph
    reached: dict[Any, set[Any]] = {}
    for node in graph.nodes:
        reached[node] = {node}.union(*(reached[source] for source in node.all_input_nodes))
    backward = [n for n in graph.nodes if n.target is torch.ops.aten.tanh_backward.default]
    inputs = [
        n for n in graph.nodes
        if n.target is torch.ops.aten.index_select.default and n.meta["val"].is_floating_point()
    ]  # fmt: skip
    waits = sorted(sum(b in reached[n] for b in backward) for n in inputs)
    assert len(backward) == 2 * PARTS
    if per == "batch":
        assert waits == [1, 2, 4, 5]
    else:  # both passes of a part wait for both passes of the parts before
        assert set(waits) == {2, 4}
