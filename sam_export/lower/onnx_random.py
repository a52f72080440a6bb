"""Random words and masks in an ONNX graph: inputs that the session fills.

ONNX Runtime's CPU runs Philox in integer operators one whole tensor at a time, at 21 ns a word;
NumPy, chunk by chunk in the cache, takes 6 (`docs/benchmarks`). Its CUDA training build has no
kernels for shifts and bitwise operators at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import sympy
import torch
from torch import Tensor

from sam_export.artifact.contract import ProgramSpec, StepContract
from sam_export.tracing.randomness import drawn_nodes

_DOMAIN = "sam_export"
_WORDS, _MASK = "RandomWords", "RandomMask"


def _place_of_words(seed: Tensor, step: Tensor, size: Sequence[int], stream: int) -> Tensor:
    return _place(_WORDS, {"stream": stream}, torch.int32, size)


def _place_of_mask(
    seed: Tensor, step: Tensor, size: Sequence[int], stream: int, threshold: int
) -> Tensor:
    return _place(_MASK, {"stream": stream, "threshold": threshold}, torch.bool, size)


def _place(
    name: str, attributes: dict[str, Any], dtype: torch.dtype, size: Sequence[int]
) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::{name}", (), attrs=attributes, dtype=dtype, shape=tuple(size), version=1
    )


DRAWS_AS_PLACES: dict[Any, Callable[..., Any]] = {
    torch.ops.sam_export.random_words.default: _place_of_words,
    torch.ops.sam_export.random_mask.default: _place_of_mask,
}
"""Decompositions that put a symbolic ONNX operator in the place of every draw."""


def random_inputs(
    program: torch.export.ExportedProgram, spec: ProgramSpec, contract: StepContract
) -> list[dict[str, Any]]:
    """The inputs of random words and masks that a program has, for the manifest.

    Returns:
        For each: ``input`` (its name), ``stream``, and ``size``: per dimension a number, or an
        expression in the symbolic sizes of the contract (``64*batch``); of a mask ``threshold``
        too, see `artifact.philox.random_mask`.
    """
    names: dict[Any, Any] = {}
    given = set(program.graph_signature.user_inputs)  # constants of the model come first
    inputs = [n for n in program.graph.find_nodes(op="placeholder") if n.name in given]
    for node, item in zip(inputs, contract.inputs_of(spec), strict=True):
        for size, name in zip(node.meta["val"].shape, item.shape, strict=True):
            if isinstance(name, str):
                # The size is the symbol, or a whole multiple of it.
                factor, symbol = size.node.expr.as_coeff_Mul()
                names[symbol] = sympy.Symbol(name, integer=True, positive=True) / factor

    def written(size: Any) -> int | str:
        if isinstance(size, int):
            return size
        above, below = sympy.fraction(sympy.together(size.node.expr.subs(names)))
        return str(above) if below == 1 else f"({above})//{below}"

    found = []
    for node in drawn_nodes(program.graph):
        stream, *threshold = node.args[3:]
        kind = _MASK if threshold else _WORDS
        entry: dict[str, Any] = {
            "input": _name(kind, stream),
            "stream": stream,
            "size": [written(extent) for extent in node.meta["val"].shape],
        }
        if threshold:
            entry["threshold"] = threshold[0]
        found.append(entry)
    return found


def draws_as_inputs(model: ir.Model) -> list[ir.Value]:
    """Makes every draw an input of the graph; returns these inputs."""
    graph = model.graph
    drawn = []
    for node in list(graph):
        if node.domain == _DOMAIN and node.op_type in (_WORDS, _MASK):
            (result,) = node.outputs
            name = _name(node.op_type, node.attributes["stream"].as_int())
            value = ir.Value(name=name, type=result.type, shape=result.shape)
            result.replace_all_uses_with(value, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            drawn.append(value)
    graph.inputs.extend(drawn)
    model.opset_imports.pop(_DOMAIN, None)
    return drawn


def _name(kind: str, stream: Any) -> str:
    """Name of the graph input that holds the words or the mask of a stream."""
    return f"{'random_mask' if kind == _MASK else 'random_words'}.{stream}"
