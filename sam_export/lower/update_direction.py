"""The captured update taken apart: the gradient that goes in, and the direction that comes out."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sam_export._compat.origins import stage_of
from sam_export._compat.program import appended
from sam_export.errors import LoweringError

aten = torch.ops.aten
UPDATE = "update"
"""Stage of the nodes that the base optimizer's own ``step`` became."""


def gradient_of(new: fx.Node, parameter: str) -> fx.Node:
    """``g_adv`` of one parameter: the one thing that its update takes from outside.

    Args:
        new: The parameter's new value, a node of the captured step.
        parameter: Its name, for the message.

    Raises:
        LoweringError: The update takes none or several, or one of another shape.
    """
    taken = {
        source
        for node in _within(new)
        for source in node.all_input_nodes
        if stage_of(source) != UPDATE and source.op == "call_function"
    }
    shape = new.meta["val"].shape
    if len(taken) != 1 or next(iter(taken)).meta["val"].shape != shape:
        raise LoweringError(
            f"The update of {parameter!r} takes {len(taken)} tensors of the passes, where one "
            "gradient of the parameter's shape is expected. Use target onnx-training or onnx."
        )
    return taken.pop()


def depends_on(node: fx.Node, sources: Collection[fx.Node]) -> bool:
    """Whether ``node`` is computed from one of ``sources``."""
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        found = pending.pop()
        if found in sources:
            return True
        if found not in seen:
            seen.add(found)
            pending.extend(found.all_input_nodes)
    return False


def _within(new: fx.Node) -> Iterator[fx.Node]:
    """The nodes of the update that ``new`` needs."""
    seen: set[fx.Node] = set()
    pending = [new]
    while pending:
        node = pending.pop()
        if node not in seen and stage_of(node) == UPDATE:
            seen.add(node)
            yield node
            pending.extend(node.all_input_nodes)


class NotAffine(Exception):
    """A new parameter is not ``w - lr * direction`` with a direction free of ``lr``."""


@dataclass(frozen=True)
class _Term:
    """``at_zero + lr * factor * slope``: how a node depends on the learning rate.

    Attributes:
        at_zero: Its value at ``lr = 0``: a node, or a number.
        factor: Number in front of the slope.
        slope: A node; None for 1.
    """

    at_zero: fx.Node | float
    factor: float
    slope: fx.Node | None


class Direction:
    """Writes ``d`` of ``new = w - lr * d`` into a graph, by the rules of a linear function.

    Nothing is assumed about the optimizer: every operator between the learning rate and the new
    parameter has to be one through which a linear term passes exactly.

    Args:
        graph: The captured step's; nodes are added to it.
        learning_rate: Its input ``hyper.lr``, float64[1].
    """

    def __init__(self, graph: fx.Graph, learning_rate: fx.Node) -> None:
        self._graph = graph
        self._rate = learning_rate
        self._terms: dict[fx.Node, _Term] = {}

    def of(self, new: fx.Node, old: fx.Node) -> fx.Node:
        """``d``, a node of the parameter's shape.

        Args:
            new: The parameter's new value.
            old: The parameter.

        Raises:
            NotAffine: It is another function of the learning rate.
        """
        term = self._term(new)
        if term.at_zero is not old:
            raise NotAffine("with a learning rate of 0 the new parameter is not the old one")
        if term.slope is None:
            raise NotAffine("the new parameter is the old one and a number")
        return self._scaled(-term.factor, term.slope)

    def _scaled(self, factor: float, node: fx.Node) -> fx.Node:
        if factor == 1.0:
            return node
        if factor == -1.0:
            return appended(self._graph, aten.neg.default, node)
        return appended(self._graph, aten.mul.Tensor, node, factor)

    def _varies(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and depends_on(value, {self._rate})

    def _term(self, node: fx.Node) -> _Term:
        if node not in self._terms:
            self._terms[node] = self._derived(node)
        return self._terms[node]

    def _derived(self, node: fx.Node) -> _Term:
        if not self._varies(node):
            return _Term(node, 0.0, None)
        if self._is_the_rate(node):
            return _Term(0.0, 1.0, None)
        rule = _RULES.get(node.target)
        if rule is None:
            raise NotAffine(f"{node.target} of the learning rate")
        term: _Term = rule(self, node)
        return term

    def _is_the_rate(self, node: fx.Node) -> bool:
        """``unbind(lr)[0]``, or ``lr[0]``."""
        if node.target is aten.select.int:
            return node.args[0] is self._rate
        source = node.args[0] if node.args else None
        return (
            isinstance(source, fx.Node)
            and source.target is aten.unbind.int
            and source.args[0] is self._rate
            and node.args[1:] == (0,)
        )

    # -- rules: one for each operator through which a linear term passes --------------------------

    def negated(self, node: fx.Node) -> _Term:
        term = self._term(node.args[0])  # type: ignore[arg-type]
        return _Term(self._only_number(term, -1.0), -term.factor, term.slope)

    def copied(self, node: fx.Node) -> _Term:
        term = self._term(node.args[0])  # type: ignore[arg-type]
        slope = term.slope
        if slope is not None:
            slope = appended(self._graph, node.target, slope, **node.kwargs)
        return _Term(self._only_number(term, 1.0), term.factor, slope)

    def multiplied(self, node: fx.Node) -> _Term:
        x, y = node.args[:2]
        if self._varies(y):
            x, y = y, x
        if self._varies(y):
            raise NotAffine("a product of two values that depend on the learning rate")
        term = self._term(x)  # type: ignore[arg-type]
        if not isinstance(y, fx.Node):
            at_zero = self._only_number(term, float(y))  # type: ignore[arg-type]
            return _Term(at_zero, term.factor * float(y), term.slope)  # type: ignore[arg-type]
        at_zero = 0.0 if term.at_zero == 0.0 else y if term.at_zero == 1.0 else node
        if at_zero is node:
            raise NotAffine("a factor that is neither 0 nor 1 at a learning rate of 0")
        slope = y if term.slope is None else appended(self._graph, node.target, term.slope, y)
        return _Term(at_zero, term.factor, slope)

    def divided(self, node: fx.Node) -> _Term:
        x, y = node.args[:2]
        if self._varies(y) or not self._varies(x):
            raise NotAffine("a divisor that depends on the learning rate")
        term = self._term(x)  # type: ignore[arg-type]
        if term.at_zero != 0.0:
            raise NotAffine("a dividend that is not 0 at a learning rate of 0")
        if not isinstance(y, fx.Node):
            return _Term(0.0, term.factor / float(y), term.slope)  # type: ignore[arg-type]
        if term.slope is None:
            slope = appended(self._graph, aten.reciprocal.default, y)
        else:
            slope = appended(self._graph, node.target, term.slope, y)
        return _Term(0.0, term.factor, slope)

    def added(self, node: fx.Node) -> _Term:
        sign = -1.0 if node.target is aten.sub.Tensor else 1.0
        return self._sum(node.args[0], node.args[1], sign * float(node.kwargs.get("alpha", 1)))  # type: ignore[arg-type]

    def subtracted_from(self, node: fx.Node) -> _Term:
        """``rsub.Scalar(x, number, alpha=1) = number - alpha * x``."""
        alpha = float(node.args[2]) if len(node.args) > 2 else 1.0  # type: ignore[arg-type]
        term = self._term(node.args[0])  # type: ignore[arg-type]
        if term.at_zero != 0.0:
            raise NotAffine("a difference that is not a number at a learning rate of 0")
        return _Term(float(node.args[1]), -alpha * term.factor, term.slope)  # type: ignore[arg-type]

    def quotient_added(self, node: fx.Node) -> _Term:
        """``addcdiv(x, a, b, value=1) = x + value * a / b``."""
        x, a, b = node.args[:3]
        if self._varies(b):
            raise NotAffine("a divisor that depends on the learning rate")
        return self._sum_with(x, a, b, aten.div.Tensor, node)

    def product_added(self, node: fx.Node) -> _Term:
        """``addcmul(x, a, b, value=1) = x + value * a * b``."""
        x, a, b = node.args[:3]
        if self._varies(b):
            a, b = b, a
        if self._varies(b):
            raise NotAffine("a product of two values that depend on the learning rate")
        return self._sum_with(x, a, b, aten.mul.Tensor, node)

    def _sum_with(self, x: Any, a: Any, b: Any, operator: Any, node: fx.Node) -> _Term:
        value = float(node.kwargs.get("value", 1))  # type: ignore[arg-type]
        if not self._varies(a):
            raise NotAffine("an update that is not proportional to the learning rate")
        term = self._term(a)
        if term.at_zero != 0.0 or term.slope is None:
            raise NotAffine("an update that is not 0 at a learning rate of 0")
        slope = appended(self._graph, operator, term.slope, b)
        return self._joined(self._term(x), _Term(0.0, value * term.factor, slope))

    def _sum(self, x: Any, y: Any, alpha: float) -> _Term:
        if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
            raise NotAffine("a sum with a number")
        term = self._term(y)
        return self._joined(
            self._term(x),
            _Term(self._only_number(term, alpha), alpha * term.factor, term.slope),
        )

    def _joined(self, x: _Term, y: _Term) -> _Term:
        if y.at_zero == 0.0:
            at_zero = x.at_zero
        elif x.at_zero == 0.0:
            at_zero = y.at_zero
        else:
            raise NotAffine("a sum of two values that are not 0 at a learning rate of 0")
        if x.factor == 0.0 or y.factor == 0.0:
            one = y if x.factor == 0.0 else x
            return _Term(at_zero, one.factor, one.slope)
        if x.slope is None or y.slope is None:
            raise NotAffine("a sum of a tensor and a number")
        large, small = (x, y) if abs(x.factor) >= abs(y.factor) else (y, x)
        alpha = small.factor / large.factor
        slope = appended(self._graph, aten.add.Tensor, large.slope, small.slope, alpha=alpha)
        return _Term(at_zero, large.factor, slope)

    @staticmethod
    def _only_number(term: _Term, factor: float) -> fx.Node | float:
        """The term's value at 0, times ``factor``."""
        if isinstance(term.at_zero, fx.Node):
            if factor != 1.0:
                raise NotAffine("a multiple of a tensor")
            return term.at_zero
        return factor * term.at_zero


_RULES: dict[Any, Any] = {
    aten.neg.default: Direction.negated,
    aten._to_copy.default: Direction.copied,
    aten.mul.Tensor: Direction.multiplied,
    aten.div.Tensor: Direction.divided,
    aten.add.Tensor: Direction.added,
    aten.sub.Tensor: Direction.added,
    aten.rsub.Scalar: Direction.subtracted_from,
    aten.addcdiv.default: Direction.quotient_added,
    aten.addcmul.default: Direction.product_added,
}
