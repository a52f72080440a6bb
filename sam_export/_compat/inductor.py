"""Files of `torch.export`, and Inductor."""

from __future__ import annotations

import importlib
import inspect
import io
import types
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam_export._compat.precision import older_settings_readable

EAGER_NUMERICS = {"emulate_precision_casts": True}
"""Inductor's options with which it rounds where eager does.

By default fused operators keep float32 where eager has bfloat16 or float16 in between. Muon's
update, which amplifies that, comes out in another direction (cosine 0.92).
"""


def exported_bytes(program: torch.export.ExportedProgram) -> bytes:
    """A program as `torch.export.save` writes it, without its example inputs.

    They would hold the whole state once more in every program's file.
    """
    examples = program.example_inputs
    buffer = io.BytesIO()
    try:
        program.example_inputs = None
        torch.export.save(program, buffer)
    finally:
        program.example_inputs = examples
    return buffer.getvalue()


def load_exported(path: Path, device: torch.device) -> Callable[..., Sequence[Tensor]]:
    """The graph of a saved `torch.export` program, without its input guards, on ``device``."""
    return on_device(_loaded(path), device)


def operators_of_exported(path: Path) -> Counter[str]:
    """How often each operator occurs in a saved `torch.export` program."""
    targets = (node.target for node in _loaded(path).graph.nodes if node.op == "call_function")
    return Counter(
        str(target).removeprefix("aten.")
        for target in targets
        if isinstance(target, torch._ops.OpOverload)
    )


def _loaded(path: Path) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # pytree's, about its own LeafSpec
        return torch.export.load(path)


def on_device(
    program: torch.export.ExportedProgram, device: torch.device
) -> Callable[..., Sequence[Tensor]]:
    """The graph of an exported program, without its input guards, on ``device``."""
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    module: Any = program.module(check_guards=False)
    return module  # type: ignore[no-any-return]


def exported(
    module: torch.nn.Module, arguments: tuple[Tensor, ...], shapes: Sequence[dict[int, Any]]
) -> torch.export.ExportedProgram:
    """``module``, which takes its tensors as ``*arguments``, as a program that may mutate them."""
    with warnings.catch_warnings(), older_settings_readable():
        warnings.simplefilter("ignore", FutureWarning)  # pytree's, about its own LeafSpec
        return torch.export.export(module, arguments, dynamic_shapes=(tuple(shapes),), strict=False)


def exported_model(
    model: torch.nn.Module,
    examples: Mapping[str, Tensor],
    shapes: Mapping[str, dict[int, Any]],
    by_name: bool,
) -> torch.export.ExportedProgram:
    """A model whose ``forward`` takes any arguments, as a program whose arguments have names.

    Args:
        model: What to export.
        examples: Its inputs by name, in order.
        shapes: For each of them the symbolic sizes by dimension.
        by_name: Whether inputs are passed by name.
    """
    # torch.export takes the names of the arguments, and of their sizes, from the signature.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in examples])
    forward: Any = type(model).forward
    forward.__signature__ = signature.replace(
        parameters=[inspect.Parameter("self", kind), *signature.parameters.values()]
    )
    arguments: tuple[Any, ...] = () if by_name else tuple(examples.values())
    with warnings.catch_warnings(), older_settings_readable():
        warnings.simplefilter("ignore", FutureWarning)  # pytree's, about its own LeafSpec
        return torch.export.export(
            model,
            arguments,
            dict(examples) if by_name else None,
            dynamic_shapes=dict(shapes),
            strict=False,
        )


def compiled(
    function: Callable[..., Any], varying: Collection[int], eager_random: bool
) -> Callable[..., Any]:
    """``function`` as one graph under Inductor.

    Dynamo guards every tensor of every call, which takes as long as a small step. Here only the
    sizes of the tensors ``varying`` can change: the session has checked what it was given, owns the
    rest, and means the same under any ambient setting (autocast, gradient mode). No two arguments
    may be one object: that they are is not guarded either.

    Args:
        function: What to compile.
        varying: Positions in its argument ``batch`` of the tensors whose sizes may change from call
            to call.
        eager_random: Draw random numbers as eager does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, about torch.jit
        importlib.import_module("torch._inductor.compile_fx")

    guarded = {f"L['batch'][{index}]" for index in varying}  # Dynamo's names of them

    def kept(guards: Sequence[Any]) -> list[bool]:
        return [
            guard.guard_type == "SHAPE_ENV"
            or (guard.guard_type == "TENSOR_MATCH" and guard.name in guarded)
            for guard in guards
        ]

    # Dynamo keeps compiled code by code object, and these guards do not look at closures: without
    # a code object of its own, a second session would run the code of the first.
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    options: dict[str, Any] = {
        "guard_filter_fn": kept,
        "fallback_random": eager_random,
        **EAGER_NUMERICS,
    }
    made: Callable[..., Any] = torch.compile(own, fullgraph=True, options=options)  # type: ignore[call-overload]
    return made


def mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Tells Dynamo that a dimension varies from call to call; it has no other name for that."""
    torch._dynamo.mark_dynamic(tensor, dim)


def may_vary(tensor: Tensor, dim: int) -> None:
    """Like `mark_dynamic`, where it is no error if the graph turns out to fix the size."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def compiled_with(module: torch.nn.Module, backend: str) -> Callable[..., Sequence[Tensor]]:
    """``module`` as one graph under a backend of torch.compile (``eager``, ``aot_eager``, …).

    Inductor has the options that it has in `compiled`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, about torch.jit
        importlib.import_module("torch._inductor.compile_fx")
    options: Any = EAGER_NUMERICS if backend == "inductor" else None
    made: Any = torch.compile(module, fullgraph=True, backend=backend, options=options)
    return made  # type: ignore[no-any-return]
