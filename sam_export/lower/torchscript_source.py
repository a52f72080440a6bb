"""A functional ATen graph written out as TorchScript source, one line per operator."""

from __future__ import annotations

import copy
import json
import keyword
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from sam_export._compat import origins
from sam_export.errors import LoweringError
from sam_export.lower.torchscript_in_place import in_place_form
from sam_export.step.philox import COMPOSITES

RESERVED = {
    "self",
    "torch",
    "Tensor",
    "ValueError",
    "len",
    "device",
    "float",
    "int",
    "bool",
    "min",
    "max",
    "math",
}
"""Names that the written code uses itself."""

_INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
    operator.truediv: "/",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}
_CALLS: dict[Any, str] = {
    operator.neg: "-{0}",
    torch.sym_float: "float({0})",
    torch.sym_int: "int({0})",
    torch.sym_max: "max({0}, {1})",
    torch.sym_min: "min({0}, {1})",
    torch.sym_not: "not {0}",
    math.ceil: "math.ceil({0})",
    math.floor: "math.floor({0})",
}
# Promises about sizes that the trace has made; the session and the module check sizes themselves.
_PROMISES = {
    "aten._assert_scalar.default",
    "aten._assert_tensor_metadata.default",
    "aten.sym_constrain_range.default",
}


class Names:
    """Local names of one method, readable and unique."""

    def __init__(self) -> None:
        self._taken = set(RESERVED)

    def make(self, wanted: str) -> str:
        """``wanted`` as an identifier that is not taken yet."""
        base = re.sub(r"\W", "_", wanted, flags=re.ASCII) or "value"
        if base[0].isdigit() or keyword.iskeyword(base):
            base = f"v_{base}"
        name, count = base, 1
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name


class GraphWriter:
    """Writes the nodes of one graph as lines.

    Args:
        graph: Functional: no operator writes to its inputs.
        inputs: The name of a local that holds each placeholder's value.
        names: Where new locals get their names.
        constant: Name of the expression that holds a tensor constant of the graph.
        overwrites: Node to the position of the operand that it may write over.

    Raises:
        LoweringError: The graph holds something that TorchScript cannot say.
    """

    def __init__(
        self,
        graph: fx.Graph,
        inputs: Sequence[str],
        names: Names,
        constant: Callable[[str], str],
        overwrites: Mapping[fx.Node, int],
    ) -> None:
        placeholders = graph.find_nodes(op="placeholder")
        self._names = names
        self._constant = constant
        self._overwrites = overwrites
        self._known: dict[fx.Node, str] = dict(zip(placeholders, inputs, strict=True))

    def functional(self) -> GraphWriter:
        """A writer that goes on from here on its own, and overwrites nothing."""
        other = copy.copy(self)
        other._known, other._overwrites = dict(self._known), {}
        return other

    def lines(self, nodes: Iterable[fx.Node]) -> list[str]:
        """The lines that compute these nodes; they must come in the graph's order."""
        return [line for node in nodes for line in self._lines_of(node)]

    def expression(self, value: Any, kind: str = "") -> str:
        """An argument as source; ``kind`` is its schema type, which an empty list needs."""
        if isinstance(value, fx.Node):
            return self._known[value]
        if isinstance(value, (list, tuple)):
            return self._list(value, kind)
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        if isinstance(value, float):
            return repr(value) if math.isfinite(value) else f'float("{value}")'
        if isinstance(value, torch.device):
            return "device"
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        raise LoweringError(
            f"TorchScript source has no form for the constant {value!r} ({type(value).__name__})."
        )

    def _list(self, values: Sequence[Any], kind: str) -> str:
        inner = re.sub(r"^Optional\[(List\[.*\])\]$", r"\1", kind)
        match = re.fullmatch(r"List\[(.*)\]", inner)
        text = f"[{', '.join(map(self.expression, values))}]"
        mixed = None in values or not values
        if match and mixed:
            return f"torch.jit.annotate(List[{match[1].replace('SymInt', 'int')}], {text})"
        return text

    def _lines_of(self, node: fx.Node) -> list[str]:
        if node in self._known or str(node.target) in _PROMISES:
            return []
        if node.op == "get_attr":
            self._known[node] = self._constant(str(node.target))
            return []
        target: Any = node.target
        if node.op != "call_function":
            raise LoweringError(f"TorchScript source has no form for {node.format_node()}.")
        if target is operator.getitem:
            source, index = node.args
            self._known[node] = f"{self._known[source]}[{index}]"  # type: ignore[index]
            return []
        if isinstance(target, torch._ops.OpOverload):
            call = self._call(target, node)
            parts = self._parts(target, node)
            return [f"{parts or self._local(node)} = {call}"]
        arguments = [self.expression(value) for value in node.args]
        if target in _INFIX:
            text = f"({arguments[0]} {_INFIX[target]} {arguments[1]})"
        elif target in _CALLS:
            text = f"({_CALLS[target].format(*arguments)})"
        else:
            raise LoweringError(
                f"TorchScript has no form for {target} (from "
                f"{origins.origin_of(node) or 'the step'})."
            )
        return [f"{self._local(node)} = {text}"]

    def _call(self, target: torch._ops.OpOverload, node: fx.Node) -> str:
        schema = target._schema
        arguments = []
        operands, packet = list(node.args), str(target.overloadpacket)
        if node in self._overwrites:
            packet = str(in_place_form(target)).rpartition(".")[0]
            operands[0], operands[index] = operands[index := self._overwrites[node]], operands[0]
        for argument, value in zip(schema.arguments, operands, strict=False):
            text = self.expression(value, str(argument.type))
            arguments.append(f"{argument.name}={text}" if argument.kwarg_only else text)
        types = {argument.name: str(argument.type) for argument in schema.arguments}
        for name, value in node.kwargs.items():
            arguments.append(f"{name}={self.expression(value, types[name])}")
        if target is torch.ops.aten._to_copy.default and _is_bool(node.args[0]):
            # A copy of the bytes: TorchScript has no view with a dtype, and ATen converts bool six
            # times as slowly as uint8.
            arguments[0] = f"torch.view_copy({arguments[0]}, dtype=torch.uint8)"
        if target in COMPOSITES:
            return f"self.{packet.rpartition('.')[2]}({', '.join(arguments)})"
        return f"torch.ops.{packet}({', '.join(arguments)})"

    def _parts(self, target: torch._ops.OpOverload, node: fx.Node) -> str:
        """Locals for the parts of a tuple that are used, so that the others are freed at once."""
        count = len(target._schema.returns)
        if count < 2:
            return ""
        parts = ["_"] * count
        for user in node.users:
            assert user.target is operator.getitem
            index = user.args[1]
            assert isinstance(index, int)
            if parts[index] == "_":
                parts[index] = self._names.make(user.name)
            self._known[user] = parts[index]
        return ", ".join(parts)

    def _local(self, node: fx.Node) -> str:
        self._known[node] = self._names.make(node.name)
        return self._known[node]


def _is_bool(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.meta["val"].dtype == torch.bool


def needed_only_by(graph: fx.Graph, kept: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that none of ``kept`` needs."""
    needed: set[fx.Node] = set()
    pending = list(kept)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    # All parts of an operator with several results are named where the operator is written.
    return {node for node in graph.nodes if node not in needed and node.op == "call_function"}


def attribute(path: str) -> str:
    """Source of ``self.<path>``; parts that are no identifiers go through ``getattr``."""
    text = "self"
    for part in path.split("."):
        plain = part.isascii() and part.isidentifier() and not keyword.iskeyword(part)
        text = f"{text}.{part}" if plain else f"getattr({text}, {json.dumps(part)})"
    return text


def indented(lines: Iterable[str], depth: int = 1) -> list[str]:
    """The lines, ``depth`` levels further in."""
    return [f"{'    ' * depth}{line}" for line in lines]
