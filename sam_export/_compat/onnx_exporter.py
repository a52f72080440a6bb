"""torch's ONNX exporter, in its own stages: decompose, promote types, translate.

`torch.onnx.export` runs the same stages. Called one by one, they need one decomposition instead of
two, its registry of 1,500 translations is read once per process instead of once per program (0.7 s
each), and everything that has no ONNX form is known before the translation starts. Public, and
slower: `torch.onnx.export(program, dynamo=True, custom_translation_table=forms)`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.onnx._internal.exporter import (
    _core,
    _decomp,
    _fx_passes,
    _ir_passes,
    _registration,
)

from sam_export._compat.precision import older_settings_readable
from sam_export._compat.tracing import TORCH, forget_history

Forms = Mapping[Any, Callable[..., Any]]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without "torchvision is not installed" and "failed to infer the signature", for each form."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@functools.cache
def _torchlib(opset: int) -> Any:
    with _quiet():
        return _registration.ONNXRegistry.from_torchlib(opset_version=opset)


def _registry(opset: int, forms: Forms) -> Any:
    registry = _registration.ONNXRegistry()
    registry._opset_version = opset
    registry.functions = {name: list(metas) for name, metas in _torchlib(opset).functions.items()}
    with _quiet():
        for target, function in forms.items():
            registry.register_op(target, function)
    return registry


def decomposed(
    program: torch.export.ExportedProgram,
    opset: int,
    forms: Forms,
    targets: Sequence[Any],
    own: Forms,
    refused: dict[Any, str],
    refusal: type[Exception],
) -> torch.export.ExportedProgram:
    """``program`` in operators that have an ONNX form, as far as decompositions lead there.

    Args:
        program: A functional program.
        opset: Of the translations that count.
        forms: Our own ONNX forms; such operators stay whole.
        targets: Operators for which torch's decomposition is taken though the exporter has a form.
        own: Our own decompositions.
        refused: Gets the operators that one of our own decompositions refuses, and why. They stay.
        refusal: What a decomposition raises to refuse its arguments; its text stands for itself.
    """
    registry = _registry(opset, forms)
    known = set(_decomp.get_onnx_implemented_overloads(registry))
    table: dict[Any, Callable[..., Any]] = {}
    table |= _decomp.create_onnx_friendly_decomposition_table(known)
    table |= torch._decomp.get_decompositions(targets)  # type: ignore[arg-type]
    table |= {
        target: _watched(target, function, refused, refusal) for target, function in own.items()
    }
    # As the exporter does it: sizes of 0 and 1 are as symbolic as others.
    with (
        torch.fx.experimental._config.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
        warnings.catch_warnings(),
        older_settings_readable(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # pytree's, about its own LeafSpec
        forget_history(program.graph_module)
        result: torch.export.ExportedProgram = program.run_decompositions(table)
        _float_bounds(result.graph_module)
        _fx_passes.insert_type_promotion_nodes(result.graph_module)
        result._graph_module = _fx_passes.remove_assertion_nodes(result.graph_module)
    return result


def _float_bounds(graph_module: torch.fx.GraphModule) -> None:
    """Writes ``clamp(x, 1e-6, 50)`` of a floating ``x`` with two floats.

    The pass that inserts type promotions makes a tensor of the one that is an int, and then finds
    no overload for it (torch 2.13).
    """
    for node in graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.clamp.default
    ):
        if node.args[0].meta["val"].is_floating_point():
            x, *bounds = node.args
            node.args = (x, *(float(b) if type(b) is int else b for b in bounds))


def decomposition_of(target: Any) -> Callable[..., Any]:
    """torch's own decomposition of an operator."""
    found: dict[Any, Callable[..., Any]] = torch._decomp.get_decompositions([target])  # type: ignore[assignment]
    return found[target]


def _watched(
    target: Any,
    function: Callable[..., Any],
    refused: dict[Any, str],
    refusal: type[Exception],
) -> Callable[..., Any]:
    """``function`` with results row by row, as ATen's are: the views behind them rely on it.

    What it refuses stays as it is, and is noted. So is what it fixes: a loop over a symbolic size
    would be right for the example's size only.
    """

    def watched(*arguments: Any, **named: Any) -> Any:
        sizes = _Sizes((arguments, named))
        try:
            results = function(*arguments, **named)
        except Exception as error:
            known = isinstance(error, refusal)
            text = "" if known else f"Its decomposition failed: {type(error).__name__}: "
            refused[target] = f"{text}{error}"
            return NotImplemented
        fixed = sizes.fixed()
        if fixed:
            refused[target] = (
                f"It needs fixed sizes in ONNX; what is written would only be right while {fixed}. "
                "Capture with dynamic=None, or mark other sizes."
            )
            return NotImplemented
        if results is NotImplemented:
            return results
        if isinstance(results, torch.Tensor):
            return results.contiguous()
        return tuple(result.contiguous() for result in results)

    return watched


class _Sizes:
    """What is known of symbolic sizes, to see what becomes known."""

    def __init__(self, arguments: Any) -> None:
        sizes = [
            size
            for value in torch.utils._pytree.tree_leaves(arguments)
            for size in (value.shape if isinstance(value, torch.Tensor) else [value])
            if isinstance(size, torch.SymInt)
        ]
        self._env = sizes[0].node.shape_env if sizes else None
        self._guards = len(self._env.guards) if self._env is not None else 0
        self._replaced = set(self._env.replacements) if self._env is not None else set()

    def fixed(self) -> str:
        """The conditions of branches that were taken outside torch since then; empty for none."""
        if self._env is None:
            return ""
        found = [
            str(guard.expr)
            for guard in self._env.guards[self._guards :]
            if not getattr(guard.sloc.framework_loc, "filename", "").startswith(TORCH)
        ]
        for symbol in set(self._env.replacements) - self._replaced:
            found.append(f"{symbol} == {self._env.replacements[symbol]}")
        return " and ".join(found)


def without_form(program: torch.export.ExportedProgram, opset: int, forms: Forms) -> list[fx.Node]:
    """The nodes that neither we nor the exporter can translate; all that hold subgraphs are."""
    registry = _registry(opset, forms)
    return [
        node
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.HigherOrderOperator)
        or (
            isinstance(node.target, torch._ops.OpOverload)
            and not _core._is_onnx_op(node.target)
            and not registry.is_registered(node.target)
        )
    ]


def to_onnx(
    program: torch.export.ExportedProgram,
    inputs: list[str],
    outputs: list[str],
    opset: int,
    forms: Forms,
) -> Any:
    """torch's ONNX translation of a program that is `decomposed`, an `onnx_ir.Model`.

    The exporter's rewriting passes are not run: they cost more time than the translation.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        registry = _registry(opset, forms)
        model = _core._exported_program_to_onnx_program(program, registry=registry).model
    _ir_passes.rename_inputs(model, inputs)
    _ir_passes.rename_outputs(model, outputs)
    return model
