"""A model called with other tensors in the place of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def call_with(
    model: nn.Module, state: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """``model(*args, **kwargs)`` with the tensors of ``state``, in every place where they are used.

    `torch.func.functional_call` finds the other places of a tied tensor itself, but where one
    module has two names it swaps the same attribute twice and leaves its own tensor in the model.
    So the places are listed here, each once.

    Args:
        model: Left as it is.
        state: Tensors by the first name of a parameter or buffer.
        args: Positional arguments of the call.
        kwargs: Named ones.
    """
    named = chain(model.named_parameters(), model.named_buffers())
    names = {id(tensor): name for name, tensor in named}
    places = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = chain(
            module.named_parameters(recurse=False, remove_duplicate=False),
            module.named_buffers(recurse=False, remove_duplicate=False),
        )
        for attribute, tensor in own:
            if names[id(tensor)] in state:
                places[prefix + attribute] = state[names[id(tensor)]]
    return torch.func.functional_call(model, places, tuple(args), dict(kwargs), tie_weights=False)
