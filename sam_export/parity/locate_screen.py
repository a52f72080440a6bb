"""Which nodes of a step differ by themselves, with all nodes of one kind compiled once.

A deep model repeats itself: a graph of 3,000 nodes has some 200 kinds of node (operator, arguments,
layouts of its inputs). One of each kind stands beside the others in one graph, which is compiled
once and run with the inputs of every node of those kinds. So the whole graph is put to the test at
the cost of compiling a tenth of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.fx.node import map_arg

from sam_export.parity.interpret import StepGraph
from sam_export.parity.locate_judge import Moved, gaps
from sam_export.parity.locate_torch import TorchForm, TorchPiece, compiled_piece, run_compiled
from sam_export.parity.tolerances import Tolerances

_TOGETHER = 200
"""Nodes that are compiled as one graph: fewer cost a start of the compiler more often, and of many
kinds in one graph all run as often as the most frequent."""


class AllBut(Mapping[str, Tensor]):
    """Values by name without some of them.

    Args:
        values: All of them.
        without: Names of those that are not there.
    """

    def __init__(self, values: Mapping[str, Tensor], without: Iterable[str]) -> None:
        self._values, self._without = values, frozenset(without)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._without:
            raise KeyError(name)
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values and name not in self._without

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._values if name not in self._without)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class Part:
    """One node, with what has no value of its own on the way to what it reads.

    Attributes:
        name: The node.
        given: Eager's values of all others.
        nodes: What is computed: tuples and sizes, and the node itself.
        ends: Names of the values that are read.
    """

    name: str
    given: Mapping[str, Tensor]
    nodes: Sequence[fx.Node]
    ends: Sequence[str]


class Screen:
    """Runs every node of a step by itself, as a target compiles it.

    Args:
        graph: The captured step with eager's values.
        form: The target's form.
        tol: The numbers that decide.

    Attributes:
        runs: How many graphs were compiled.
    """

    def __init__(self, graph: StepGraph, form: TorchForm, tol: Tolerances) -> None:
        self.graph, self.form, self.tol = graph, form, tol
        self.runs = 0

    def differing(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` whose values differ if only they are computed, in that order.

        Raises:
            ParityError: The target does not compile one of them.
        """
        order = list(names)
        alike: dict[Any, list[Part]] = defaultdict(list)
        for name in order:
            given = AllBut(self.graph.values, [name])
            part = Part(name, given, *self.graph.between([name], given))
            alike[self._kind(part)].append(part)
        found: set[str] = set()
        for kinds in _batches(list(alike.values())):
            found |= self._of_batch(kinds)
        return [name for name in order if name in found]

    def _kind(self, part: Part) -> Any:
        """The same for two parts whose compiled code is the same."""
        places = {name: place for place, name in enumerate(part.ends)}
        lines: list[Any] = []
        for name in part.ends:
            value = part.given[name]
            sizes = self.graph.nodes[name].meta["val"].shape
            varies = tuple(not isinstance(size, int) for size in sizes)
            lines.append((tuple(value.shape), value.stride(), value.dtype, varies))

        def argument(value: fx.Node) -> Any:
            return f"%{places[value.name]}"

        for node in part.nodes:
            places[node.name] = len(places)
            args, kwargs = map_arg(node.args, argument), map_arg(node.kwargs, argument)
            lines.append((str(node.target), repr(args), repr(kwargs)))
        return tuple(lines)

    def _of_batch(self, kinds: Sequence[Sequence[Part]]) -> set[str]:
        run = self._compiled([kind[0] for kind in kinds])
        found: set[str] = set()
        for turn in range(max(len(kind) for kind in kinds)):
            parts = [kind[min(turn, len(kind) - 1)] for kind in kinds]
            given = {part.name: part.given for part in parts}
            new = {kind[turn].name for kind in kinds if turn < len(kind)}
            over = self._over(new, given, run(parts, given))
            for attempt in range(self.tol.retests):  # see `Search`
                if not over:
                    break
                for name in over:
                    own = AllBut(self.graph.values, [name])
                    given[name] = Moved(own, self.tol.nudge, 100 + attempt)
                over = self._over(over, given, run(parts, given))
            found |= over
        return found

    def _over(
        self,
        names: set[str],
        given: Mapping[str, Mapping[str, Tensor]],
        found: Mapping[str, NDArray[Any]],
    ) -> set[str]:
        return {
            name
            for name in names
            if gaps(self.graph, given[name], {name: found[name]}, self.tol)[0].is_over
        }

    def _compiled(self, kinds: Sequence[Part]) -> _Run:
        """What runs parts of the same kinds, in the same order, each from what is given for it."""
        way = self.form.ways[-1]
        joint = joined([self.form.piece([part.name], part.given) for part in kinds])
        compiled = compiled_piece(joint, way)
        self.runs += 1

        def run(
            parts: Sequence[Part], given: Mapping[str, Mapping[str, Tensor]]
        ) -> dict[str, NDArray[Any]]:
            values = [given[part.name][name].clone() for part in parts for name in part.ends]
            inputs = dict(zip(joint.inputs, values, strict=True))
            results = run_compiled(compiled, TorchPiece(joint.module, inputs, joint.symbolic), way)
            return {
                part.name: np.array(value.numpy())
                for part, value in zip(parts, results, strict=True)
            }

        return run


_Run = Callable[[Sequence[Part], Mapping[str, Mapping[str, Tensor]]], Mapping[str, NDArray[Any]]]


def _batches(alike: list[list[Part]]) -> Iterator[list[list[Part]]]:
    """Kinds to compile together: those that are about as frequent."""
    batch: list[list[Part]] = []
    size = 0
    for kind in sorted(alike, key=len, reverse=True):
        if batch and size + len(kind[0].nodes) > _TOGETHER:
            yield batch
            batch, size = [], 0
        batch.append(kind)
        size += len(kind[0].nodes)
    if batch:
        yield batch


def joined(pieces: Sequence[TorchPiece]) -> TorchPiece:
    """Pieces side by side in one graph; their inputs and results are in the order of the pieces."""
    made = fx.Graph()
    copies: list[dict[fx.Node, fx.Node]] = []
    inputs: dict[str, Tensor] = {}
    for number, piece in enumerate(pieces):
        copied: dict[fx.Node, fx.Node] = {}
        ends = piece.module.graph.find_nodes(op="placeholder")
        for node, value in zip(ends, piece.inputs.values(), strict=True):
            name = f"part{number}_{node.name}"
            copied[node] = made.placeholder(name)
            copied[node].meta["val"] = node.meta["val"]
            inputs[name] = value
        copies.append(copied)
    results: list[Any] = []
    for piece, copied in zip(pieces, copies, strict=True):
        for node in piece.module.graph.nodes:
            if node.op == "output":
                results += [copied[value] for value in node.args[0]]
            elif node.op != "placeholder":
                copied[node] = made.node_copy(node, copied.__getitem__)
    made.output(tuple(results))
    module = fx.GraphModule(torch.nn.Module(), made)
    return TorchPiece(module, inputs, tuple(dims for p in pieces for dims in p.symbolic))
