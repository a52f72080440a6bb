"""A batch in parts, for the oracle. It imports nothing of this package, on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def parts_of(batch: Any, count: int) -> list[Any]:
    """``count`` equal, consecutive parts of a batch of tensors.

    Tensors that are as long as the first one are cut; each part gets the others whole.
    """
    if count == 1:
        return [batch]
    values = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    total = len(values[0])
    if total % count:
        raise ValueError(f"{total} examples cannot be cut into {count} equal parts")
    length = total // count

    def cut(value: Tensor, start: int) -> Tensor:
        whole = value.dim() == 0 or len(value) != total
        return value if whole else value[start : start + length]

    starts = range(0, total, length)
    if isinstance(batch, Mapping):
        return [{key: cut(value, start) for key, value in batch.items()} for start in starts]
    return [[cut(value, start) for value in values] for start in starts]


class Rounds:
    """What is averaged over several perturbations of one step.

    Args:
        count: How many there are; with one, nothing is changed.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.scalars: dict[str, list[Tensor]] = {}
        self.stages: dict[str, Tensor] = {}
        self._sums: dict[str, dict[nn.Parameter, Tensor]] = {"g": {}, "g_adv": {}}

    def note(self, **scalars: Tensor) -> None:
        """Keeps scalars of one round."""
        for name, value in scalars.items():
            self.scalars.setdefault(name, []).append(value.detach())

    def means(self) -> dict[str, Tensor]:
        """The mean of each scalar over the rounds."""
        return {name: torch.stack(values).mean() for name, values in self.scalars.items()}

    def add_stages(self, stages: Mapping[str, Tensor]) -> None:
        """Adds this round's share of a mean."""
        for name, value in stages.items():
            share = value.clone() if self.count == 1 else value / self.count
            self.stages[name] = self.stages[name] + share if name in self.stages else share

    def add_gradients(self, which: str, parameters: Sequence[nn.Parameter]) -> None:
        """Adds the gradients that the parameters hold now."""
        sums = self._sums[which]
        for p in parameters:
            if p.grad is not None:
                sums[p] = sums[p] + p.grad if p in sums else p.grad.clone()

    def put_gradients(self, which: str, parameters: Sequence[nn.Parameter]) -> None:
        """Gives the parameters the means as their gradients."""
        sums = self._sums[which]
        for p in parameters:
            p.grad = sums[p] / self.count if p in sums else None
