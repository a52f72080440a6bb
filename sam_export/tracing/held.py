"""Tensors under dotted names in a module that has no code."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def hold(root: nn.Module, path: str, value: Tensor, parameter: bool = False) -> None:
    """Puts a tensor at a dotted path, making the modules on the way.

    Args:
        root: Gets it.
        path: As torch names parameters and buffers (``layers.0.weight``).
        value: The tensor; it is kept and not copied.
        parameter: Whether it is a parameter (that asks for no gradient) or a buffer.
    """
    *parents, leaf = path.split(".")
    module: Any = root
    for part in parents:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]
    if parameter:
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    else:
        module.register_buffer(leaf, value)
