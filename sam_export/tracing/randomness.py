"""Random operators of a captured step: finding them, and giving both passes the same draw.

Only steps that draw from torch's generator (`Semantics.generator`) hold random ATen operators;
`share_draws` is for them. The others hold operators of `step.philox`, shared as they are traced.
"""

from __future__ import annotations

import contextlib
import operator
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import fx

from sam_export._compat import origins
from sam_export.errors import CaptureError
from sam_export.step.draws import without_dropout
from sam_export.step.philox import COMPOSITES


def random_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Nodes that draw from torch's generator, in order of execution."""
    return [
        node
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
        and not without_dropout(node.target, node.args, node.kwargs)
    ]


def drawn_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Nodes that draw from Philox, in order of execution."""
    return [node for node in graph.nodes if node.target in COMPOSITES]


@contextlib.contextmanager
def frozen_draws_refused() -> Iterator[None]:
    """Refuses a trace in which the model drew from Python's or NumPy's own generator.

    Such a number would be a constant of the graph.

    Raises:
        CaptureError: It did; both generators are put back.
    """
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    try:
        yield
        drew = [
            name
            for name, moved in (
                ("random", random.getstate() != python),
                ("numpy.random", not _same(np.random.get_state(legacy=False), numpy)),
            )
            if moved
        ]
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
    if drew:
        raise CaptureError(
            f"The model draws from {' and '.join(drew)} in its forward pass: that number would be "
            "the same in every step of the graph. Draw with torch (torch.rand, torch.bernoulli)."
        )


def _same(a: Any, b: Any) -> bool:
    """Whether two states of NumPy's generator are equal."""
    return a["state"]["pos"] == b["state"]["pos"] and np.array_equal(
        a["state"]["key"], b["state"]["key"]
    )


_ATEN = torch.ops.aten

_PURE_DRAWS = frozenset(
    (
        "bernoulli.p",
        "exponential",
        "normal_functional",
        "rand",
        "rand_like",
        "randint",
        "randint.low",
        "randint_like",
        "randint_like.low_dtype",
        "randn",
        "randn_like",
        "randperm",
        "uniform",
    )
)
"""Random operators whose result depends on the generator and on shapes, on no tensor's values."""


def share_draws(graph_module: fx.GraphModule) -> None:
    """Makes later passes use the random draws of the first one.

    All passes run the same forward, so they hold the same random operators in the same order; the
    draw of the k-th one of a later pass becomes that of the k-th one of the first.

    Raises:
        CaptureError: The passes do not draw alike, or an operator mixes its draw with values.
    """
    graph = graph_module.graph
    stages: dict[str, list[fx.Node]] = {"ascent": [], "descent": []}
    for node in random_nodes(graph):
        stages.setdefault(origins.stage_of(node), []).append(node)
    ascents, last = stages.pop("ascent"), stages.pop("descent")
    # Of several ascent steps, all of which have one name, each has as many draws as the descent.
    first, later = ascents[: len(last)], ascents[len(last) :] + last
    passes = len(later) // max(len(first), 1)
    if any(stages.values()) or [n.target for n in first] * passes != [n.target for n in later]:
        raise CaptureError(
            "The passes do not draw random numbers alike (ascent: "
            f"{', '.join(str(n.target) for n in ascents) or 'nothing'}; descent: "
            f"{', '.join(str(n.target) for n in last) or 'nothing'}), so they cannot share them. "
            'Capture with Semantics(randomness="fresh").'
        )
    for drawn, again in zip(first * passes, later, strict=True):
        if _name(again) == "native_dropout":
            _share_dropout(graph, drawn, again)
        elif _name(again) in _PURE_DRAWS:
            again.replace_all_uses_with(drawn)
        else:
            raise CaptureError(
                f"{again.target} draws from the values that it is given, so the draw of the first "
                'pass cannot be used in the second. Capture with Semantics(randomness="fresh").'
                f"\n{again.meta.get('stack_trace') or ''}"
            )
        graph.erase_node(again)
    graph.eliminate_dead_code()
    graph_module.recompile()


def _share_dropout(graph: fx.Graph, drawn: fx.Node, again: fx.Node) -> None:
    """``native_dropout(x, p, train) -> (x * mask / (1 - p), mask)`` with the mask of ``drawn``.

    Replacing its whole result would also replace the activations by those of the first pass.
    """
    x, p, _ = again.args
    assert isinstance(x, fx.Node)
    (mask,) = (user for user in _results(drawn) if user.args[1] == 1)
    scale = 0.0 if p == 1 else 1.0 / (1.0 - float(p))  # type: ignore[arg-type]
    with graph.inserting_before(again):
        cast = graph.call_function(_ATEN._to_copy.default, (mask,), {"dtype": x.meta["val"].dtype})
        kept = graph.call_function(_ATEN.mul.Tensor, (x, cast))
        output = graph.call_function(_ATEN.mul.Tensor, (kept, scale))
    for node in (cast, kept, output):
        node.meta = {**again.meta, "val": x.meta["val"]}
    for user in _results(again):
        user.replace_all_uses_with(mask if user.args[1] == 1 else output)
        graph.erase_node(user)


def share_dropout_factors(graph_module: fx.GraphModule) -> None:
    """Makes all uses of a mask take the factors ``mask / (1 - p)`` that its first one computed.

    The backward of each pass, and the second pass. Memory is at its peak at the end of the second
    forward, where the factors of all layers are alive anyway.
    """
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=_ATEN.native_dropout_backward.default):
        gradient, mask, scale = node.args
        made = [
            factors
            for cast in mask.users
            if cast.target == _ATEN._to_copy.default
            for factors in cast.users
            if factors.target == _ATEN.mul.Tensor
            and factors.args == (cast, scale)
            and factors.meta["val"].dtype == gradient.meta["val"].dtype
        ]
        if not made:
            continue
        node.target, node.args = _ATEN.mul.Tensor, (gradient, made[0])
        for again in made[1:]:
            again.replace_all_uses_with(made[0])
            graph.erase_node(again)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _results(node: fx.Node) -> list[fx.Node]:
    """The ``getitem`` nodes of an operator with several results."""
    return [user for user in node.users if user.target is operator.getitem]


def _name(node: fx.Node) -> str:
    """``bernoulli.p``; without the overload where it is the default one."""
    return str(node.target).removeprefix("aten.").removesuffix(".default")
