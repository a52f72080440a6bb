"""Stock optimizers, run inside a trace."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch


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
