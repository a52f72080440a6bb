"""Where a graph node came from: its stage of the step, its module, the user's source line."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx.traceback
from torch import Tensor, fx

META = "sam_export"
"""Key in ``node.meta["custom"]`` under which a graph node carries where it came from."""

SEQUENCE = "sam_export_sequence"
"""Key of the number of the autograd node that a node of a backward pass belongs to."""

LINE = "sam_export_line"
"""Key of the user's source line."""

NUMBER = "sam_export_node"
"""Key of the name of the captured node, while `numbered` is open."""


class ModulePaths:
    """Stamps the nodes of a trace with the module that they come from, backward nodes too.

    While a module's forward runs, its path is the current one. Autograd nodes carry the sequence
    number of the forward operator that made them; the backward pass looks its module up by that.
    ``stack_trace``-like propagation in AOTAutograd works the same way but is not callable from
    here; `torch.fx.traceback.annotate` would replace the direct write once it covers backward.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._numbers: list[int] = []
        self._paths: list[str] = []
        self._stack: list[str] = [""]
        self.stage = ""

    def _mark(self) -> None:
        number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self._numbers.append(number)
        self._paths.append(self._stack[-1])
        self._stamp(self._stack[-1])

    def _stamp(self, path: str, number: int | None = None) -> None:
        if torch.fx.traceback.has_preserved_node_meta():
            custom: dict[str, Any] = {META: f"{self.stage}/{path}".strip("/")}
            if number is not None:
                custom[SEQUENCE] = number
            torch.fx.traceback.current_meta["custom"] = custom

    def at(self, stage: str) -> None:
        """Names the stage of the step that follows (``ascent``, ``perturb``, ``update``)."""
        self.stage = stage
        self._stamp("")

    def watch(self, loss: Tensor) -> None:
        """Makes the backward pass from ``loss`` stamp its nodes with the forward's modules."""
        seen = set()
        pending = [loss.grad_fn]
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            number = node._sequence_nr()
            index = bisect.bisect_right(self._numbers, number) - 1
            path = self._paths[index] if index >= 0 else ""
            node.register_prehook(lambda _, path=path, number=number: self._stamp(path, number))
            pending.extend(following for following, _ in node.next_functions)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Watches every module of the model while it is open."""
        handles = []
        for path, module in self._model.named_modules():

            def enter(*_: Any, path: str = path) -> None:
                self._stack.append(path)
                self._mark()

            def leave(*_: Any) -> None:
                self._stack.pop()
                self._mark()

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            torch.fx.traceback.current_meta.pop("custom", None)


def origin_of(node: fx.Node) -> str:
    """``stage/module.path`` that a node of a captured graph comes from; empty when unknown."""
    return str((node.meta.get("custom") or {}).get(META, ""))


def stage_of(node: fx.Node) -> str:
    """``ascent``, ``descent`` or ``update``; empty when unknown."""
    return origin_of(node).partition("/")[0]


def line_of(node: fx.Node) -> str:
    """The user's source line that a node of a captured graph comes from; empty when unknown."""
    return str((node.meta.get("custom") or {}).get(LINE, ""))


@contextlib.contextmanager
def numbered(graph: fx.Graph | None) -> Iterator[None]:
    """While open, what a decomposition makes of each node of ``graph`` carries the node's name.

    Args:
        graph: Its nodes get the mark, and lose it again. None: nothing happens.
    """
    nodes = [] if graph is None else list(graph.nodes)
    before = [node.meta.get("custom") for node in nodes]
    for node, custom in zip(nodes, before, strict=True):
        node.meta["custom"] = {**(custom or {}), NUMBER: node.name}
    try:
        yield
    finally:
        for node, custom in zip(nodes, before, strict=True):
            if custom is None:
                del node.meta["custom"]
            else:
                node.meta["custom"] = custom


def numbered_as(node: fx.Node) -> str:
    """Name of the captured node that a node was made for; empty when unknown."""
    return str((node.meta.get("custom") or {}).get(NUMBER, ""))


def stamp_lines(graph: fx.Graph, user_line: Callable[[str], str]) -> None:
    """Gives every node of a fresh trace the user's source line that it comes from.

    A node of a backward pass has no line of its own; it gets that of the forward operator whose
    autograd node it belongs to. Both carry that node's sequence number.

    Args:
        graph: As traced, with stack traces.
        user_line: The line of a stack trace that is the user's; empty where there is none.
    """
    lines: dict[int, str] = {}
    for node in graph.nodes:
        custom = node.meta.get("custom")
        if node.op != "call_function" or not custom:
            continue
        number = custom.get(SEQUENCE)
        if number is None:
            line = user_line(node.stack_trace or "")
            lines.setdefault(node.meta.get("seq_nr", -1), line)
        else:
            line = lines.get(number, "")
        if line:
            node.meta["custom"] = {**custom, LINE: line}
