"""Symbolic tracing by `make_fx`, and exported programs."""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx.traceback
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    statically_known_true,
)

from sam_export._compat.precision import older_settings_readable

TORCH = os.path.dirname(torch.__file__) + os.sep
_NN = os.path.join(TORCH, "nn") + os.sep


class _WitnessedEnv(ShapeEnv):
    """Remembers where a symbolic size was fixed to a number; torch keeps its own frame only."""

    fixed_at: traceback.StackSummary | None = None

    def _set_replacement(self, *args: Any, **kwargs: Any) -> None:
        if self.fixed_at is None:
            self.fixed_at = traceback.extract_stack()
        super()._set_replacement(*args, **kwargs)


class FakeInputs:
    """Fake tensors whose marked dimensions are symbolic, each mark one symbol, all else static.

    `torch.export` does the same for its arguments; it offers no way to share the mode with
    `make_fx`, whose own symbolic mode makes every size of every tensor symbolic and lets equal
    sizes share a symbol (a batch of 10 and 10 classes).

    Args:
        multiples: Symbolic size to a number that divides it: the size is that number times a
            symbol, so that a part of it is a symbol and no division.
    """

    def __init__(self, multiples: Mapping[str, int]) -> None:
        self._multiples = multiples
        self.shape_env = _WitnessedEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)
        self._sizes: dict[str, Any] = {}

    def user_guards(self) -> list[tuple[str, str]]:
        """(condition, location) of every branch on a symbolic size that changes what is computed.

        Branches in torch's shape and layout functions only choose strides; those do not count.
        """
        found = []
        for guard in self.shape_env.guards:
            location = guard.sloc.framework_loc
            if not isinstance(location, traceback.FrameSummary):
                found.append((self._named(guard.expr), str(guard.sloc)))
            elif not location.filename.startswith(TORCH) or location.filename.startswith(_NN):
                where = f"{location.filename}:{location.lineno}, in {location.name}"
                found.append((self._named(guard.expr), f"{where}: {location.line}"))
        return found

    @property
    def fixed_at(self) -> traceback.StackSummary | None:
        """The stack that first fixed a symbolic size to a number."""
        return self.shape_env.fixed_at

    def symbols(self) -> dict[str, str]:
        """Symbol, as it prints, to the name it was given."""
        return {str(size): name for name, size in self._sizes.items()}

    def _named(self, condition: Any) -> str:
        names = {size.node.expr: name for name, size in self._sizes.items()}
        return str(condition.subs(names))

    def fake(self, tensor: Tensor, dims: dict[int, str]) -> Tensor:
        """A fake of ``tensor``; dimension ``d`` is the symbol ``dims[d]``."""
        if not dims:
            return self.mode.from_tensor(tensor, static_shapes=True)
        shape = [
            self._size(dims[d], size) if d in dims else size for d, size in enumerate(tensor.shape)
        ]
        with self.mode:
            return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)

    def _size(self, name: str, example: int) -> Any:
        if name not in self._sizes:
            context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            count = self._multiples.get(name, 1)
            vector = self.mode.from_tensor(torch.empty(example // count), symbolic_context=context)
            self._sizes[name] = count * vector.shape[0]
        return self._sizes[name]


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal; symbolic ones are where that holds for all their values.

    A comparison of symbolic sizes itself would be a branch on them.
    """
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return statically_known_true(a == b)
    return bool(a == b)


def trace(function: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor]) -> fx.GraphModule:
    """ATen graph of ``function`` on fake arguments (see `FakeInputs`), with stack traces.

    `torch.export.export` cannot trace `torch.autograd.grad`; `make_fx` can.
    """
    with torch.fx.traceback.preserve_node_meta():
        traced: fx.GraphModule = make_fx(
            function,
            tracing_mode="symbolic",
            record_stack_traces=True,
            _allow_non_fake_inputs=True,
        )(*arguments)
    return traced


def bring_constants_to_cpu(graph_module: fx.GraphModule) -> None:
    """Puts the tensors that a graph holds on the CPU, where its arguments are."""
    for module in graph_module.modules():
        holders: tuple[dict[str, Any], ...] = (vars(module), module._buffers, module._parameters)
        for held in holders:
            for name, value in held.items():
                if isinstance(value, Tensor) and value.device.type != "cpu":
                    held[name] = on_cpu(value)


def on_cpu(value: Tensor) -> Tensor:
    """A copy on the CPU; of a parameter a parameter."""
    copy = value.detach().cpu()
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(copy, value.requires_grad)
    return copy


def functional(graph_module: fx.GraphModule, arguments: Sequence[Tensor]) -> fx.GraphModule:
    """A graph that `trace` made, with a new tensor in place of every write into one.

    Args:
        graph_module: The graph.
        arguments: The fake arguments that it was traced with.
    """
    forget_history(graph_module)
    run = torch.func.functionalize(Interpreted(graph_module), remove="mutations")
    made: fx.GraphModule = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        *arguments
    )
    return made


class Interpreted(torch.nn.Module):
    """A graph as a module whose re-tracing keeps each node's metadata."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module

    def forward(self, *arguments: Tensor) -> Any:
        """Runs the graph node by node."""
        with torch.fx.traceback.preserve_node_meta():
            return torch.fx.Interpreter(self.graph_module).run(*arguments)


@contextlib.contextmanager
def without_mkldnn() -> Iterator[None]:
    """Traces the plain ATen kernels rather than oneDNN's own operators (``mkldnn_rnn_layer``).

    `torch.backends.mkldnn.flags` does this too, but also sets a TF32 flag, with a warning.
    """
    old = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(old)


def decomposed_by(
    program: torch.export.ExportedProgram, table: dict[Any, Callable[..., Any]]
) -> torch.export.ExportedProgram:
    """``program`` with the decompositions of ``table`` applied."""
    with warnings.catch_warnings(), older_settings_readable():
        warnings.simplefilter("ignore", FutureWarning)  # pytree's, about its own LeafSpec
        forget_history(program.graph_module)
        result: torch.export.ExportedProgram = program.run_decompositions(table)
    return result


def forget_history(graph_module: fx.GraphModule) -> None:
    """Drops from each node the record of the nodes it was made from.

    Each re-tracing adds a link and copies the whole chain for every node, a sixth of its time.
    """
    for node in graph_module.graph.nodes:
        node.meta.pop("from_node", None)
