"""Torch's own generators during a step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Generators:
    """Those of the CPU and of the devices of some tensors, and where they stood at first."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._devices = sorted({str(tensor.device) for tensor in tensors if tensor.is_cuda})
        self._states = self._of_part = self._now()

    def rewind(self) -> None:
        """Puts them back to where they stood."""
        self._put_back(self._states)

    def rewind_for_pass(self, stage: str) -> None:
        """Puts them back before each pass, to where the first one of a part of the batch began."""
        if stage == "part":
            self._of_part = self._now()
        if stage in ("ascent", "descent"):
            self._put_back(self._of_part)

    def have_moved(self) -> bool:
        """Whether something has been drawn from one of them."""
        return any(not torch.equal(a, b) for a, b in zip(self._states, self._now(), strict=True))

    def _put_back(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    def _now(self) -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]
