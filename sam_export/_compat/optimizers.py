"""Stock optimizers, run inside a trace."""

from __future__ import annotations

import builtins
import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

BRANCHES_UNLESS_CAPTURABLE = (torch.optim.ASGD, torch.optim.RAdam, torch.optim.Rprop)
"""Optimizers whose for-loop form reads a tensor into Python, or assigns through a mask, and whose
``capturable`` form computes the same without."""


@contextlib.contextmanager
def as_if_compiling() -> Iterator[None]:
    """``torch.compiler.is_compiling()`` is true inside.

    Stock optimizers then take the paths that keep tensor-valued hyper-parameters and step counters
    as tensors. `torch.export.export` sets the same flag; a public context would replace this.
    """
    old = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = old


def init_group(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Lets a stock optimizer make the slots of one group, where it has a method for that.

    ``_init_group(group, list, list, ...)`` exists in all of torch.optim; a public "make the state"
    method would replace it. An optimizer without it is left alone.
    """
    method = getattr(optimizer, "_init_group", None)
    if method is None:
        return
    wanted = [
        parameter
        for parameter in inspect.signature(method).parameters.values()
        if parameter.default is inspect.Parameter.empty
    ]
    method(group, *([] for _ in wanted[1:]))


@contextlib.contextmanager
def with_tensor_numbers(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """``min``, ``max`` and ``math`` take tensors in the module that ``optimizer`` is written in.

    Optimizers compute step sizes in Python, from numbers that they have read out of tensors or keep
    as numbers; where those stay tensors, Python's own functions would read them. Optimizers that
    use ``torch.minimum`` and ``torch.sqrt`` would replace this.
    """
    # Classes of torch.optim give another module as theirs; their functions know the right one.
    spaces = {
        id(space): space
        for kind in type(optimizer).__mro__
        if issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
        for space in [inspect.unwrap(kind.__init__).__globals__]
    }
    names = ("min", "max", "math")
    before = [(space, {name: space.get(name) for name in names}) for space in spaces.values()]
    try:
        for space, own in before:
            space["min"] = _of_tensors(own["min"] or builtins.min, torch.minimum)
            space["max"] = _of_tensors(own["max"] or builtins.max, torch.maximum)
            if own["math"] is math:
                space["math"] = _TensorMath()
        yield
    finally:
        for space, own in before:
            for name, value in own.items():
                if value is None:
                    space.pop(name, None)
                else:
                    space[name] = value


class _TensorMath:
    """Python's ``math``, with ``torch``'s function of that name where an argument is a tensor."""

    def __getattr__(self, name: str) -> Any:
        plain, of_tensors = getattr(math, name), getattr(torch, name, None)
        if not callable(plain) or of_tensors is None:
            return plain
        return _of_tensors(plain, of_tensors)


def _of_tensors(plain: Callable[..., Any], of_tensors: Callable[..., Any]) -> Callable[..., Any]:
    """Calls the second where an argument is a tensor, in float64, as Python's numbers are."""

    def chosen(*values: Any, **options: Any) -> Any:
        if options or not any(isinstance(value, Tensor) for value in values):
            return plain(*values, **options)
        return of_tensors(*(torch.as_tensor(value, dtype=torch.float64) for value in values))

    return chosen
