"""Autocast and loss scaling of the oracle, by hand. It imports nothing of this package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class OraclePrecision:
    """What a loop with `torch.autocast` and a gradient scaler does, without either's bookkeeping.

    Args:
        autocast: Dtype that the forward pass casts to; None: no autocast.
        scaling: ``growth_factor``, ``backoff_factor`` and ``growth_interval``; None: no scale.
        scale: What the loss of the next step is multiplied by.
        clean_steps: How many steps had no overflow since the scale last changed.
    """

    def __init__(
        self,
        autocast: torch.dtype | None = None,
        scaling: Mapping[str, float] | None = None,
        scale: float = 1.0,
        clean_steps: int = 0,
    ) -> None:
        self.autocast = autocast
        self.scaling = scaling
        self.scale, self.clean_steps = np.float32(scale), clean_steps
        self.is_exact = False
        """Whether it computes in float64: no cast then, and no scale, which float64 needs not."""

    @property
    def casts(self) -> bool:
        """Whether a forward pass rounds to a narrower dtype than the weights'."""
        return self.autocast is not None and not self.is_exact

    def casting(self, device: torch.device) -> AbstractContextManager[Any]:
        """The surroundings of a forward pass and its loss."""
        if not self.casts:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of ``loss``, scaled, to those that the parameters hold."""
        if self.scaling is None or self.is_exact:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        (loss * torch.tensor(self.scale, device=loss.device)).backward()

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divides the gradients of ``parameters`` by the scale."""
        if self.scaling is None or self.is_exact:
            return
        inverse = torch.tensor(1.0 / np.float64(self.scale), dtype=torch.float32)
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(inverse.to(p.device))

    def results(self) -> dict[str, float]:
        """The scale, as a result of the step that is under way."""
        return {} if self.scaling is None else {"loss_scale": float(self.scale)}

    def update(self, finite: bool) -> None:
        """The scale after a step."""
        if self.scaling is None:
            return
        if not finite:
            self.scale = np.float32(float(self.scale) * self.scaling["backoff_factor"])
            self.clean_steps = 0
            return
        self.clean_steps += 1
        if self.clean_steps == self.scaling["growth_interval"]:
            grown = float(self.scale) * self.scaling["growth_factor"]
            if grown <= float(np.finfo(np.float32).max):
                self.scale = np.float32(grown)
            self.clean_steps = 0

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """The state of the scale by name; empty without one."""
        if self.scaling is None:
            return {}
        return {
            "scaler.scale": np.array(self.scale),
            "scaler.growth_tracker": np.array(self.clean_steps, np.int64),
        }

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """The inverse of `snapshot`."""
        if self.scaling is not None:
            self.scale = np.float32(state["scaler.scale"])
            self.clean_steps = int(state["scaler.growth_tracker"])


def wide_norm(tensors: Sequence[Tensor]) -> Tensor:
    """One L2 norm over all tensors, in at least float32, on the device of the first one."""
    wide = [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]
    norm: Tensor = torch.norm(torch.stack([t.norm().to(tensors[0].device) for t in wide]))
    return norm
