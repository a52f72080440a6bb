"""The search alone, over a form that is eager itself with faults put in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import sam_export as sx
from sam_export.parity.interpret import StepGraph, run_nodes
from sam_export.parity.locate_judge import gaps
from sam_export.parity.locate_search import Search, direct_readers
from sam_export.parity.tolerances import Tolerances


class Faulty:
    """Eager, but for the values of a piece that ``spoil`` changes."""

    ways = ("eager",)

    def __init__(self, graph: StepGraph, spoil: Callable[[set[str], str, Tensor], Tensor]) -> None:
        self.graph, self.spoil = graph, spoil
        self.values = list(graph.values)

    def readers(self, name: str, known: Callable[[str], bool]) -> set[str]:
        return direct_readers(name, self.graph.users, known)

    def run(
        self, wanted: Sequence[str], given: Mapping[str, Tensor], way: str = ""
    ) -> dict[str, NDArray[Any]]:
        nodes, ends = self.graph.between(wanted, given)
        inside = {node.name for node in nodes}
        values: dict[str, Any] = {name: given[name] for name in ends}
        for node in nodes:
            inputs = {other.name: values[other.name] for other in node.all_input_nodes}
            found = run_nodes([node], inputs, False)[node.name]
            spoils = isinstance(found, Tensor)
            values[node.name] = self.spoil(inside, node.name, found) if spoils else found
        return {name: np.array(values[name].numpy()) for name in wanted}


@pytest.fixture(scope="module")
def graph() -> StepGraph:
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(5, 5), nn.Tanh())]
    model = nn.Sequential(*layers)
    optimizer = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    batch = (torch.randn(7, 5), torch.randn(7, 5))
    return StepGraph(sx.capture(sx.TrainStep(model, nn.MSELoss(), optimizer), batch), batch)


def search(graph: StepGraph, spoil: Callable[[set[str], str, Tensor], Tensor]) -> Search:
    return Search(graph, Faulty(graph, spoil), Tolerances())


def test_nothing_is_found_in_eager_itself(graph: StepGraph) -> None:
    found = search(graph, lambda inside, name, value: value)
    assert found.find() is None
    assert found.runs == 1


@pytest.mark.parametrize("place", [0.0, 0.2, 0.4, 0.6, 0.8, 0.95])
def test_each_node_is_found_in_logarithmic_time(graph: StepGraph, place: float) -> None:
    read = [n for n in graph.values if n not in graph.sources and graph.nodes[n].users]
    floating = [n for n in read if graph.values[n].is_floating_point()]
    wrong = floating[int(place * len(floating))]
    result = search(graph, lambda inside, name, v: v * 1.01 if name == wrong else v)
    piece = result.find()
    assert piece is not None
    assert piece.span == (wrong,)
    assert piece.gaps[0].relative == pytest.approx(0.01, rel=1e-3)
    # Two halves per level, and each piece that differs is run three times more.
    assert result.runs <= 5 * (2 + np.log2(len(read)))


def test_of_two_faults_the_first_is_found(graph: StepGraph) -> None:
    result = search(graph, lambda inside, name, v: v * 1.01 if name in ("tanh_2", "tanh_6") else v)
    piece = result.find()
    assert piece is not None
    assert piece.span == ("tanh_2",)


def test_one_element_of_many_is_enough_and_is_named(graph: StepGraph) -> None:
    def spoil(inside: set[str], name: str, value: Tensor) -> Tensor:
        if name != "tanh_3":
            return value
        value = value.clone()
        value[4, 2] = 7.0
        return value

    piece = search(graph, spoil).find()
    assert piece is not None
    assert (piece.span, piece.gaps[0].index, piece.gaps[0].found) == (("tanh_3",), (4, 2), 7.0)


def test_not_a_number_is_no_number(graph: StepGraph) -> None:
    piece = search(graph, lambda inside, name, v: v * np.nan if name == "tanh_3" else v).find()
    assert piece is not None
    assert piece.span == ("tanh_3",)


def test_what_differs_only_together_is_a_piece_of_that_size(graph: StepGraph) -> None:
    def fused(inside: set[str], name: str, value: Tensor) -> Tensor:
        return value * 1.01 if name == "tanh_5" and "tanh_4" in inside else value

    piece = search(graph, fused).find()
    assert piece is not None
    assert (piece.span[0], piece.span[-1]) == ("tanh_4", "tanh_5")


def test_a_value_that_is_written_in_another_way_is_passed_over(graph: StepGraph) -> None:
    """One that is doubled, and halved by each of its readers, is no fault; the next fault is."""
    readers = {user.name for user in graph.nodes["tanh_2"].users}

    class Doubled(Faulty):
        def run(
            self, wanted: Sequence[str], given: Mapping[str, Tensor], way: str = ""
        ) -> dict[str, NDArray[Any]]:
            found = super().run(wanted, given)
            if "tanh_2" in found:
                found["tanh_2"] = found["tanh_2"] * np.float32(2.0)
            return found

    form = Doubled(graph, lambda inside, name, v: v * 1.01 if name == "tanh_6" else v)
    result = Search(graph, form, Tolerances())
    piece = result.find()
    assert readers
    assert piece is not None
    assert piece.span == ("tanh_6",)
    assert result.harmless in ([], ["tanh_2"])


def test_infinities_that_eager_has_too_are_no_difference() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.layer(x)
            return hidden.masked_fill(hidden > 0.3, float("-inf")).softmax(1)

    torch.manual_seed(0)
    model = Masked()
    optimizer = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    batch = (torch.randn(7, 5), torch.randn(7, 5))
    masked = StepGraph(sx.capture(sx.TrainStep(model, nn.MSELoss(), optimizer), batch), batch)
    assert any(torch.isinf(value).any() for value in masked.values.values() if value.numel())
    result = Search(masked, Faulty(masked, lambda _, name, v: v), Tolerances(), whole_first=False)
    assert result.find() is None
    infinite = next(
        name
        for name, value in masked.values.items()
        if value.dim() == 2 and value.is_floating_point() and torch.isinf(value).any()
    )

    def spoil(inside: set[str], name: str, value: Tensor) -> Tensor:
        return value.clamp(min=-1e30) if name == infinite else value

    form = Faulty(masked, spoil)
    given = {name: masked.values[name] for name in masked.sources}
    found = form.run([infinite], given)
    (gap,) = gaps(masked, given, found, Tolerances())
    assert gap.is_over
