"""What stops an ONNX export: every operator that has no form, at once, with where it comes from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch import fx

from sam_export._compat import origins
from sam_export.errors import LoweringError

GUIDE = "docs/add_an_op.md"


class Refusals:
    """Collects, during one translation, what our forms refuse, and lets the translation go on.

    Args:
        program: The program that is translated.
        forms: Our forms. The exporter calls them in the order of the graph's nodes.
    """

    def __init__(
        self, program: torch.export.ExportedProgram, forms: Mapping[Any, Callable[..., Any]]
    ) -> None:
        self.found: list[tuple[fx.Node, str]] = []
        self._waiting = iter([node for node in program.graph.nodes if node.target in forms])
        self.forms = {target: self._watched(target, form) for target, form in forms.items()}

    def _watched(self, target: Any, form: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(form)  # the exporter reads the signature
        def watched(*arguments: Any, **named: Any) -> Any:
            node = _next_of(self._waiting, target)
            try:
                return form(*arguments, **named)
            except LoweringError as error:
                self.found.append((node, str(error)))
                places = [_place() for _ in target._schema.returns]
                return places[0] if len(places) == 1 else places

        return watched


def _next_of(waiting: Iterator[fx.Node], target: Any) -> fx.Node:
    node = next(waiting)
    assert node.target is target, f"the exporter went from {node.target} to {target}"
    return node


def _place() -> ir.Value:
    """Stands for a value that could not be made; the exporter gives it its dtype and shape."""
    value: ir.Value = op.Constant(value_float=0.0)
    return value


def refusal(program: str, found: Iterable[tuple[fx.Node, str]]) -> LoweringError:
    """The error that names each operator once: schema, reason, how often, module, source line.

    Args:
        program: Name of the program.
        found: Nodes, and why each cannot be translated (empty: there is no form).
    """
    groups: dict[tuple[str, str], list[fx.Node]] = {}
    for node, reason in found:
        schema = getattr(node.target, "_schema", node.target)
        groups.setdefault((str(schema), reason), []).append(node)
    lines = []
    for (schema, reason), nodes in groups.items():
        origin = next(filter(None, map(origins.origin_of, nodes)), "") or "the step"
        lines.append(f"  {schema}  ({len(nodes)}x, in {origin})")
        if reason:
            lines.append(f"    {reason}")
        line = next(filter(None, map(origins.line_of, nodes)), "")
        if line:
            lines.append(f"    at {line}")
    count = len(groups)
    what = "an operator" if count == 1 else f"{count} operators"
    return LoweringError(
        f"Program {program!r} holds {what} with no ONNX form:\n"
        + "\n".join(lines)
        + f"\nNothing was written. {GUIDE} shows how to add a form."
    )
