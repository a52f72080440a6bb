"""The smallest size that each symbol of a step may take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_export.step.batch import BatchLayout
from sam_export.step.train_step import TrainStep
from sam_export.tracing.state import StateLayout


def smallest_sizes(
    step: TrainStep,
    layout: BatchLayout,
    state: StateLayout,
    values: Sequence[Tensor],
    dims: Sequence[dict[int, str]],
) -> dict[str, int]:
    """The smallest size that each symbol may take: 2 where the model refuses 1 (BatchNorm)."""
    smallest = {}
    for symbol in sorted({symbol for marks in dims for symbol in marks.values()}):
        one = [
            value.narrow(d, 0, 1) if marks.get(d) == symbol else value
            for value, marks in zip(values, dims, strict=True)
            for d in [next((d for d, name in marks.items() if name == symbol), 0)]
        ]
        smallest[symbol] = 1 if _accepts(step, layout, state, one) else 2
    return smallest


def _accepts(
    step: TrainStep, layout: BatchLayout, state: StateLayout, values: Sequence[Tensor]
) -> bool:
    """Whether a forward pass in training mode takes a batch of these shapes (on fake tensors)."""
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.enable_grad():
        fakes = {name: mode.from_tensor(value) for name, value in state.values.items()}
        parameters, buffers = state.split(fakes)
        for name in state.trained:
            parameters[name].requires_grad_()
        batch = [mode.from_tensor(value.contiguous()) for value in values]
        try:
            step.objective(layout, batch)(parameters, buffers, lambda loss, _: loss)
        except (ValueError, RuntimeError):
            return False
    return True
