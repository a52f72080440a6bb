"""From a flat function of tensors to one functional ATen graph as an exported program."""

from __future__ import annotations

import functools
import linecache
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from sam_export._compat import origins, tracing
from sam_export.errors import CaptureError, SamExportError
from sam_export.tracing.recurrent import LoopedRecurrence

# Operators that pass their input on unchanged once nothing in the graph mutates.
_PASS_THROUGH = {
    torch.ops.aten.detach.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.lift_fresh_copy.default,
}


_NOT_THE_USERS = (
    str(Path(__file__).parents[1]) + os.sep,
    str(Path(torch.__file__).parent) + os.sep,
)

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)(?:\n\s+(\S[^\n]*))?')


_NO_MULTIPLES: Mapping[str, int] = MappingProxyType({})


def traced(
    function: Callable[..., Sequence[Tensor]],
    arguments: Sequence[Tensor],
    dims: Sequence[Mapping[int, str]],
    multiples: Mapping[str, int] = _NO_MULTIPLES,
) -> tuple[fx.GraphModule, dict[str, str]]:
    """One functional ATen graph of ``function``.

    Args:
        function: Flat tensors to flat tensors; it may use autograd and mutate its own temporaries.
        arguments: Example values.
        dims: Per argument: dimension to the name of its symbolic size.
        multiples: Symbolic size to a number that divides all its values.

    Returns:
        A graph without mutation, without pass-through nodes, without profiler nodes; and the
        symbol that the outputs' fake shapes use for each symbolic size, to the size's name.

    Raises:
        CaptureError: The function depends on the values of its tensors, or on a symbolic size.
    """
    fakes = tracing.FakeInputs(multiples)
    faked = [fakes.fake(value, dict(marks)) for value, marks in zip(arguments, dims, strict=True)]
    try:
        with fakes.mode, LoopedRecurrence():  # type: ignore[no-untyped-call]
            raw = tracing.trace(function, faked)
    except SamExportError:
        raise
    except Exception as error:
        raise explained(error) from error
    _refuse_guards(fakes, dims, faked)
    _drop_profiler(raw)
    tracing.bring_constants_to_cpu(raw)
    origins.stamp_lines(raw.graph, _line_in_text)
    with fakes.mode:
        graph_module = tracing.functional(raw, faked)
    _drop_pass_through(graph_module)
    return graph_module, fakes.symbols()


def exported(
    graph_module: fx.GraphModule,
    arguments: Sequence[Tensor],
    dims: Sequence[Mapping[int, str]],
    multiples: Mapping[str, int] = _NO_MULTIPLES,
) -> torch.export.ExportedProgram:
    """``graph_module`` as an exported program with the symbolic sizes of ``dims``."""
    tracing.forget_history(graph_module)
    symbols: dict[str, Any] = {}
    shapes = tuple(
        {
            dim: symbols.setdefault(name, symbolic(name, multiples.get(name, 1)))
            for dim, name in marks.items()
        }
        for marks in dims
    )
    try:
        with warnings.catch_warnings():
            # pytree warns about its own LeafSpec while export copies a graph.
            warnings.simplefilter("ignore", FutureWarning)
            return torch.export.export(
                tracing.Interpreted(graph_module),
                tuple(arguments),
                dynamic_shapes=(shapes,),
                strict=False,
            )
    except Exception as error:
        raise CaptureError(
            "The traced step cannot be exported with the symbolic sizes "
            f"{', '.join(symbols) or '(none)'}: {error}"
        ) from error


def symbolic(name: str, multiple: int, least: int = 1) -> Any:
    """A symbolic size of at least ``least``, or one that is a multiple of a number."""
    if multiple == 1:
        return torch.export.Dim(name, min=least)
    return multiple * torch.export.Dim(f"{name}_part", min=max(least // multiple, 1))


def _drop_profiler(graph_module: fx.GraphModule) -> None:
    """Removes ``record_function`` nodes, which keep Inductor from reusing memory."""
    for node in reversed(list(graph_module.graph.nodes)):
        if "_record_function" in str(node.target):
            graph_module.graph.erase_node(node)
    graph_module.recompile()


def _drop_pass_through(graph_module: fx.GraphModule) -> None:
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _PASS_THROUGH and _same_layout(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    graph_module.recompile()


def _same_layout(node: fx.Node) -> bool:
    """Whether a pass-through node keeps the strides; a copy into other strides lets views work."""
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return str(before.stride()) == str(after.stride())


def _refuse_guards(
    fakes: tracing.FakeInputs, dims: Sequence[Mapping[int, str]], faked: Sequence[Tensor]
) -> None:
    """A branch on a symbolic size would be frozen into the graph: refuse it."""
    guards = fakes.user_guards()
    where = "".join(f"\n  at {line}" for line in dict.fromkeys(line for _, line in guards))
    for marks, value in zip(dims, faked, strict=True):
        for dim, name in marks.items():
            size = value.shape[dim]
            if not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None:
                line = innermost_user_line(fakes.fixed_at or [])
                raise CaptureError(
                    f"The size {name!r} is symbolic, but the model fixes it to {size}. Remove what "
                    f"depends on that number, or capture with dynamic=None.\n  at {line}"
                )
    if guards:
        raise CaptureError(
            "The model takes a branch that depends on a symbolic size; the graph would only be "
            f"right while {' and '.join(dict.fromkeys(text for text, _ in guards))}. Remove the "
            f"branch, or capture with dynamic=None.{where}"
        )


def explained(error: Exception) -> CaptureError:
    """The error of a failed trace, with the user's own source line."""
    what, advice = "cannot be traced", "The original error is above this one."
    if _data_dependent(error):
        what = "depends on the value of a tensor"
        advice = (
            "A graph cannot branch on values or read them into Python (.item(), float(tensor), "
            "if tensor > 0, boolean indexing). Use torch.where, or move it out of the model."
        )
    elif "on the same device" in str(error):
        advice = (
            "A step is traced on the CPU, wherever its model is. Make tensors where the inputs are "
            "(device=x.device), and keep others as buffers of the model or of a loss that is a "
            "module; or move all of it to the CPU."
        )
    where = user_line(error)
    return CaptureError(
        f"The step {what}{': ' + where if where else ''}\n{_first_line(error)}\n{advice}"
    )


def _data_dependent(error: Exception) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(
        names
        & {
            "DataDependentOutputException",
            "DynamicOutputShapeException",
            "GuardOnDataDependentSymNode",
        }
    ) or "data-dependent" in str(error)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def user_line(error: BaseException) -> str:
    """File, line and source of the innermost frame outside torch and this package."""
    return innermost_user_line(traceback.extract_tb(error.__traceback__))


def innermost_user_line(stack: Iterable[traceback.FrameSummary]) -> str:
    """The last frame outside torch and this package; empty where there is none."""
    frames = [frame for frame in stack if not frame.filename.startswith((*_NOT_THE_USERS, "<"))]
    if not frames:
        return ""
    frame = frames[-1]
    source = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
    return f"{frame.filename}:{frame.lineno}, in {frame.name}: {source}"


@functools.lru_cache(maxsize=4096)
def _line_in_text(stack_trace: str) -> str:
    """`innermost_user_line` of a stack trace that is text, as the nodes of a trace carry it."""
    frames = (match.groups() for match in _FRAME.finditer(stack_trace))
    return innermost_user_line(
        traceback.FrameSummary(file, int(number), name, lookup_line=False, line=line)
        for file, number, name, line in frames
    )
