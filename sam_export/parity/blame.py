"""Whose fault a difference is: the first way of running a piece in which it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from sam_export.errors import ParityError
from sam_export.parity.interpret import StepGraph
from sam_export.parity.locate_judge import gaps
from sam_export.parity.locate_onnx import OnnxForm, run_model
from sam_export.parity.locate_search import Form, Piece
from sam_export.parity.locate_torch import AOT, OVERWRITING, PLAIN
from sam_export.parity.tolerances import Tolerances

REFERENCE = "onnx.reference"
"""Way: ONNX's own evaluator in NumPy, which says what the graph means."""

FRESH = "lowered again"
"""Way: the same part of the model as this version lowers it, in ONNX Runtime."""

_TORCH = {
    "eager": "Dynamo (differs with the backend eager already)",
    "aot_eager": "AOTAutograd (differs from the backend aot_eager on)",
    "inductor": "Inductor (the backends before it agree)",
    AOT: "AOTInductor's package (torch.compile agrees)",
    PLAIN: "TorchScript, or how the graph is written in it (lower/torchscript_source.py)",
    OVERWRITING: "the plan of operands that are written over (lower/torchscript_in_place.py)",
}


@dataclass(frozen=True)
class Blame:
    """Verdict on a piece.

    Attributes:
        fault: Whose fault it is, in words.
        ways: Way of running the piece to whether it agrees; a text where it could not be run.
        changed: ONNX nodes of the piece that are not what this version lowers the step to.
    """

    fault: str
    ways: Mapping[str, bool | str] = field(default_factory=dict)
    changed: tuple[str, ...] = ()


def blame(graph: StepGraph, form: Form, piece: Piece, tol: Tolerances) -> Blame:
    """Runs a piece that differs in each of the form's ways, and says in which it differs first.

    Args:
        graph: The captured step with eager's values.
        form: The target's form.
        piece: What `Search.find` found.
        tol: The numbers that decide.
    """
    ways: dict[str, bool | str] = {}
    for way in form.ways:
        run = partial(form.run, piece.wanted, piece.given, way)
        ways[way] = _agrees(graph, piece, tol, run)
    first = next((way for way in form.ways if ways[way] is False), "")
    if isinstance(form, OnnxForm):
        return _blame_onnx(graph, form, piece, tol, ways, first)
    return Blame(_TORCH.get(first, f"the backend {first!r} (those before it agree)"), ways)


def _blame_onnx(
    graph: StepGraph,
    form: OnnxForm,
    piece: Piece,
    tol: Tolerances,
    ways: dict[str, bool | str],
    first: str,
) -> Blame:
    model, inputs = form.piece(piece.wanted, piece.given)
    again, fed = form.piece(piece.wanted, piece.given, fresh=True)

    def reference() -> dict[str, NDArray[Any]]:
        return dict(zip(piece.wanted, _in_reference(model, inputs), strict=True))

    def fresh() -> dict[str, NDArray[Any]]:
        results = run_model(again, fed, form.ways[-1], form.is_double)
        return dict(zip(piece.wanted, results, strict=True))

    ways[REFERENCE] = _agrees(graph, piece, tol, reference)
    changed = _changed(model, again)
    if changed:
        ways[FRESH] = _agrees(graph, piece, tol, fresh)
    if first != form.ways[0]:
        level = first.lower().replace("_", " ")
        return Blame(f"ONNX Runtime's optimizer (from level {level} on)", ways, changed)
    if changed and ways[FRESH] is True:
        nodes = ", ".join(changed[:3])
        text = f"the file: {nodes} is not what this version of sam_export lowers the step to"
        return Blame(text, ways, changed)
    operators = ", ".join(
        dict.fromkeys(
            str(graph.nodes[name].target).replace("aten.", "aten::") for name in piece.span
        )
    )
    if ways[REFERENCE] is True:
        kinds = ", ".join(dict.fromkeys(node.op_type for node in model.graph.node))
        text = f"ONNX Runtime's kernels ({kinds}): ONNX's own evaluator agrees with eager"
        return Blame(text, ways, changed)
    if ways[REFERENCE] is False:
        text = f"the ONNX form of {operators}: ONNX's own evaluator differs as well"
        return Blame(text, ways, changed)
    text = f"the ONNX form of {operators}, or a kernel of it: ONNX's own evaluator does not run it"
    return Blame(text, ways, changed)


def _agrees(
    graph: StepGraph, piece: Piece, tol: Tolerances, run: Callable[[], Mapping[str, NDArray[Any]]]
) -> bool | str:
    try:
        found = run()
    except (ParityError, _ReferenceFailure) as error:
        return f"does not run: {str(error).splitlines()[0]}"
    return not any(gap.is_over for gap in gaps(graph, piece.given, found, tol))


class _ReferenceFailure(Exception):
    """ONNX's evaluator lacks an operator, or fails in it."""


def _in_reference(model: ModelProto, inputs: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
    from onnx.reference import ReferenceEvaluator

    try:
        results: Sequence[NDArray[Any]] = ReferenceEvaluator(model).run(None, dict(inputs))
    except Exception as error:  # any error of NumPy, or its own
        raise _ReferenceFailure(f"{type(error).__name__}: {error}") from error
    return [
        value.astype(onnx.helper.tensor_dtype_to_np_dtype(output.type.tensor_type.elem_type))
        for value, output in zip(results, model.graph.output, strict=True)
    ]


def _changed(model: ModelProto, fresh: ModelProto) -> tuple[str, ...]:
    """Nodes and constants that are not the same in both models, by name."""

    def parts(whole: ModelProto) -> dict[str, bytes]:
        items = (*whole.graph.node, *whole.graph.initializer)
        return {item.name: item.SerializeToString(deterministic=True) for item in items}

    here, there = parts(model), parts(fresh)
    names = dict.fromkeys((*here, *there))
    return tuple(name for name in names if here.get(name) != there.get(name))
