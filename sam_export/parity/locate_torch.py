"""Pieces of a step in the targets that run with torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from sam_export._compat import aot_inductor, inductor, torchscript
from sam_export.errors import ParityError
from sam_export.lower.torchscript_in_place import plan_in_place
from sam_export.lower.torchscript_source import GraphWriter, Names, indented
from sam_export.parity.interpret import StepGraph
from sam_export.parity.locate_search import direct_readers

BACKENDS = ("eager", "aot_eager", "inductor")
"""torch.compile's, each with one more part of the compiler at work; the target uses the last."""

AOT = "aot-inductor"
"""The way of running a piece that the target of that name has."""

PLAIN, OVERWRITING = "without overwriting", "with overwriting"
"""TorchScript, without and with operands that are written over, as the target has it."""

Runnable = Callable[[list[Tensor]], Sequence[Tensor]]
"""A piece that is ready to run: inputs in order to results."""

_WAYS = {
    "torch-compile": BACKENDS,
    AOT: (*BACKENDS, AOT),
    "torchscript": (PLAIN, OVERWRITING),
}


@dataclass(frozen=True)
class TorchPiece:
    """Part of a captured graph as a graph of its own.

    Attributes:
        module: Takes ``inputs`` in order and returns a tuple.
        inputs: Node name to value.
        symbolic: Per input, the dimensions whose size is symbolic in the captured graph.
    """

    module: fx.GraphModule
    inputs: dict[str, Tensor]
    symbolic: tuple[tuple[int, ...], ...]


class TorchForm:
    """The step of a torch target. All values of the captured graph are its own.

    Args:
        graph: The captured step with eager's values.
        target: ``torch-compile``, ``aot-inductor`` or ``torchscript``.
        backends: torch.compile's backends to blame, the one in use last; None: the usual ones.

    Attributes:
        values: See `locate_search.Form`.
        ways: See `locate_search.Form`.
    """

    def __init__(
        self, graph: StepGraph, target: str, backends: Sequence[str] | None = None
    ) -> None:
        self.graph = graph
        self.ways = tuple(backends) if backends else _WAYS[target]
        self.values = list(graph.values)
        self._latest: tuple[Any, Runnable] | None = None

    @property
    def compiles(self) -> bool:
        """Whether compiling a piece takes far longer than running it."""
        return self.ways[-1] not in (PLAIN, OVERWRITING)

    def readers(self, name: str, known: Callable[[str], bool]) -> set[str]:
        """See `locate_search.Form`."""
        return direct_readers(name, self.graph.users, known)

    def run(
        self, wanted: Sequence[str], given: Mapping[str, Tensor], way: str = ""
    ) -> dict[str, NDArray[Any]]:
        """See `locate_search.Form`."""
        piece = self.piece(wanted, given)
        key = (tuple(wanted), tuple(piece.inputs), way or self.ways[-1])
        if self._latest is None or self._latest[0] != key:
            self._latest = (key, compiled_piece(piece, key[-1]))
        # A piece that differs is run again, with other numbers, right after.
        results = run_compiled(self._latest[1], piece, key[-1])
        # Compiled code may hand out one buffer twice, or an input.
        return {name: np.array(value.numpy()) for name, value in zip(wanted, results, strict=True)}

    def piece(self, wanted: Sequence[str], given: Mapping[str, Tensor]) -> TorchPiece:
        """The graph that computes the nodes ``wanted`` from those of ``given``."""
        nodes, ends = self.graph.between(wanted, given)
        made = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for name in ends:
            original = self.graph.nodes[name]
            copies[original] = made.placeholder(name)
            copies[original].meta["val"] = original.meta["val"]
        for node in nodes:
            copies[node] = made.node_copy(node, copies.__getitem__)
        made.output(tuple(copies[self.graph.nodes[name]] for name in wanted))
        inputs = {name: given[name].clone() for name in ends}
        symbolic = tuple(
            tuple(
                d
                for d, size in enumerate(self.graph.nodes[name].meta["val"].shape)
                if not isinstance(size, int) and inputs[name].shape[d] > 1
            )
            for name in ends
        )
        return TorchPiece(fx.GraphModule(torch.nn.Module(), made), inputs, symbolic)


def compiled_piece(piece: TorchPiece, way: str) -> Runnable:
    """What runs a piece, and other inputs of the same layouts.

    Args:
        piece: What to run. torch.compile's backends compile at the first run.
        way: A backend of torch.compile, `AOT`, `PLAIN` or `OVERWRITING`.

    Raises:
        ParityError: The piece does not compile.
    """
    with _named_failure(piece, way), torch.no_grad():
        if way in (PLAIN, OVERWRITING):
            script = scripted(piece, way)
            return lambda inputs: script(*inputs)
        if way == AOT:
            with tempfile.TemporaryDirectory(prefix="sam_export-locate-") as folder:
                path = Path(folder) / "graph.pt2"
                path.write_bytes(packaged(piece))
                return aot_inductor.load_package(path, torch.device("cpu"))
        function = inductor.compiled_with(piece.module, way)

        def marked(inputs: list[Tensor]) -> Sequence[Tensor]:
            for tensor, dims in zip(inputs, piece.symbolic, strict=True):
                for d in dims:
                    inductor.may_vary(tensor, d)
            return function(*inputs)

        return marked


def run_compiled(run: Runnable, piece: TorchPiece, way: str) -> Sequence[Tensor]:
    """The results of a piece.

    Args:
        run: Of `compiled_piece`, made of this piece or of one that differs in its numbers only.
        piece: What to run.
        way: As `compiled_piece` had it.

    Raises:
        ParityError: It does not compile, or does not run.
    """
    with _named_failure(piece, way), torch.no_grad():
        return run(list(piece.inputs.values()))


@contextmanager
def _named_failure(piece: TorchPiece, way: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ParityError(
            f"A piece of {len(piece.module.graph.nodes)} nodes of the step does not run as {way}: "
            f"{type(error).__name__}: {error}"
        ) from error


def packaged(piece: TorchPiece) -> bytes:
    """A piece as a package of AOTInductor."""

    class Program(torch.nn.Module):
        def forward(self, *given: Tensor) -> Any:
            return piece.module(*given)

    marks = [dict.fromkeys(dims, torch.export.Dim.AUTO) for dims in piece.symbolic]
    program = inductor.exported(Program(), tuple(piece.inputs.values()), marks)
    return aot_inductor.package_bytes(program, eager_random=False)


def scripted(piece: TorchPiece, way: str) -> Any:
    """A piece as a `torch.jit.ScriptModule`; see `PLAIN` and `OVERWRITING`."""
    graph = piece.module.graph
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    (end,) = graph.find_nodes(op="output")
    results: Any = end.args[0]
    plan = plan_in_place(
        order=nodes,
        results=set(results),
        inputs=graph.find_nodes(op="placeholder"),
        replaced=set(),
        changing=set(nodes),
    )
    names = Names()
    local = [names.make(name) for name in piece.inputs]
    overwrites = plan.overwrites if way == OVERWRITING else {}
    writer = GraphWriter(graph, local, names, lambda name: name, overwrites)
    lines = writer.lines(nodes)
    values = ", ".join(writer.expression(node) for node in results)
    arguments = "".join(f", {name}: Tensor" for name in local)
    device = f"{local[0]}.device" if local else 'torch.device("cpu")'
    source = [f"def forward(self{arguments}) -> List[Tensor]:", f"    device = {device}"]
    source += [*indented(lines), f"    return [{values}]"]
    return torchscript.scripted(torch.nn.Module(), "\n".join(source) + "\n")
