"""A model that holds other tensors in the place of its parameters and buffers, for a while."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sam_export.errors import StepConfigError

Result = TypeVar("Result")


def call_with(
    model: nn.Module,
    state: Mapping[str, Tensor],
    function: Callable[[], Result],
    refuse_replaced: bool = True,
) -> Result:
    """``function()``, while ``model`` has the tensors of ``state`` in every place that uses them.

    Gradients belong inside ``function``, too: a checkpointed layer runs again in the backward pass,
    and has to find the same tensors there.

    `torch.func.functional_call` finds the other places of a tied tensor itself, but where one
    module has two names it swaps the same attribute twice and leaves its own tensor in the model.
    So the places are listed here, each once.

    Args:
        model: Left as it is.
        state: Tensors by the first name of a parameter or buffer.
        function: It calls the model.
        refuse_replaced: Whether the model must keep its tensors.

    Raises:
        StepConfigError: The model put another tensor into the place of a parameter or buffer; it
            would be lost.
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

    def checked() -> Result:
        result = function()
        if refuse_replaced:
            _refuse_replaced(model, places)
        return result

    holder = _Holder(model, checked)
    swapped = {f"model.{place}": tensor for place, tensor in places.items()}
    result: Result = torch.func.functional_call(holder, swapped, (), tie_weights=False)
    return result


class _Holder(nn.Module):
    """Calls a function while its submodule ``model`` has other tensors."""

    def __init__(self, model: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self) -> Any:
        """What the function returns."""
        return self.function()


def _refuse_replaced(model: nn.Module, places: Mapping[str, Tensor]) -> None:
    for place, tensor in places.items():
        path, _, attribute = place.rpartition(".")
        if getattr(model.get_submodule(path), attribute) is not tensor:
            raise StepConfigError(
                f"{type(model).__name__} assigns {place!r} anew in its forward pass "
                f"(self.{attribute} = ...), so the new value would be lost. Write into the tensor: "
                f"self.{attribute}.copy_(...)."
            )
