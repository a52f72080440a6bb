"""Where a graph node came from: its stage of the step, and its module."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx.traceback
from torch import Tensor, fx

META = "sam_export"
"""Key in ``node.meta["custom"]`` under which a graph node carries where it came from."""


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

    def _stamp(self, path: str) -> None:
        if torch.fx.traceback.has_preserved_node_meta():
            torch.fx.traceback.current_meta["custom"] = {META: f"{self.stage}/{path}".strip("/")}

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
            index = bisect.bisect_right(self._numbers, node._sequence_nr()) - 1
            path = self._paths[index] if index >= 0 else ""
            node.register_prehook(lambda _, path=path: self._stamp(path))
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
