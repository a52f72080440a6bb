"""The gradient of a mean loss by name, over the parts of a batch one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sam_export.step.loss_scaling import Scaler

Objective = Callable[
    [Mapping[str, Tensor], Mapping[str, Tensor], Callable[[Tensor, Any], Any]], Any
]
"""(parameters, buffers, use) -> ``use(scalar loss, model output)`` on one batch, called while the
model has these tensors; may update the buffers."""


class Parts:
    """The objectives of the parts of a batch, each made when its turn comes.

    Args:
        make: Number of a part, and what must be computed before it, to its objective.
        numbers: Which parts.
        before: What must be computed before the first of them.
    """

    def __init__(
        self,
        make: Callable[[int, Sequence[Tensor]], Objective],
        numbers: Sequence[int],
        before: Sequence[Tensor] = (),
    ) -> None:
        self._make = make
        self.numbers = tuple(numbers)
        self._before = tuple(before)

    def alone(self, number: int, before: Sequence[Tensor]) -> Parts:
        """One of the parts, for passes of its own after those of the others."""
        return Parts(self._make, (number,), before)

    def each(self, done: Callable[[], Sequence[Tensor]]) -> Iterator[Objective]:
        """One objective after the other; ``done`` gives what the ones before have computed."""
        for index, number in enumerate(self.numbers):
            yield self._make(number, done() if index else self._before)


def mean_gradient(
    objectives: Parts,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    names: Sequence[str],
    scaler: Scaler | None,
) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Mean loss of the parts of a batch, its gradient, and the model's outputs.

    In the order of computation, ``j`` over the ``k`` parts::

        g += gradient of (loss_j / k)       # with a scaler: of (loss_j / k * scale)
        g *= 1 / scale                      # with a scaler, once

    A part's backward pass comes before the next part's forward pass, so that only one part's
    activations are alive.

    Args:
        objectives: The loss of each part.
        parameters: All parameters by name.
        buffers: All buffers by name; updated by one part after the other.
        names: The parameters to differentiate by; one that no part's loss uses is absent from the
            result.
        scaler: The scale of the loss, if there is one.
    """
    count = len(objectives.numbers)
    leaves = {name: value.detach() for name, value in parameters.items()}
    for name in names:
        leaves[name].requires_grad_()

    def differentiated(loss: Tensor, outputs: Any) -> tuple[Tensor, Any, Sequence[Any]]:
        wanted = [leaves[name] for name in names]
        share = loss if count == 1 else loss / count
        scaled = share if scaler is None else scaler.scaled(share)
        gradients = torch.autograd.grad(scaled, wanted, allow_unused=True)
        return share.detach(), _detached(outputs), gradients

    total: Tensor | None = None
    found: dict[str, Tensor] = {}
    parts = []
    for objective in objectives.each(lambda: list(found.values())):
        with torch.enable_grad():
            share, outputs, gradients = objective(leaves, buffers, differentiated)
        total = share if total is None else total + share
        parts.append(outputs)
        for name, value in zip(names, gradients, strict=True):
            if value is not None:
                own = value.detach()
                found[name] = found[name] + own if name in found else own
    assert total is not None, "a batch has at least one part"
    if scaler is not None:
        inverse = scaler.inverse()
        found = {name: value * inverse for name, value in found.items()}
    # In the order of the parameters, whichever part used one first.
    return total, {name: found[name] for name in names if name in found}, joined(parts)


def joined(parts: Sequence[Any]) -> Any:
    """The outputs of several parts as those of one batch.

    Tensors are concatenated along dimension 0; a scalar becomes a vector, one element per part.

    Args:
        parts: Tensors in any structure, the same for all parts.
    """
    if len(parts) == 1:
        return parts[0]

    def join(*values: Any) -> Any:
        if not isinstance(values[0], Tensor):
            return values[0]
        return torch.cat(values) if values[0].dim() else torch.stack(values)

    return torch.utils._pytree.tree_map(join, *parts)


def _detached(outputs: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, outputs)
