"""What torch keeps for a whole process, during a step of the oracle. It imports nothing of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

GeneratorStates = tuple[Tensor, list[Tensor]]


@contextmanager
def default_dtype(double: bool) -> Iterator[None]:
    """Constants made in forward, and slots such as NAdam's mu_product, take the default dtype."""
    before = torch.get_default_dtype()
    if double:
        torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def generator_states() -> GeneratorStates:
    """Where torch's generators stand."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), cuda


def set_generator_states(states: GeneratorStates) -> None:
    """Puts them back."""
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])


def flat_generator_states() -> list[Tensor]:
    """The same as one list, to compare."""
    first, others = generator_states()
    return [first, *others]
