"""Which values the symbolic sizes of a captured step may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sam_export.errors import StepConfigError
from sam_export.step.batch import BatchLayout
from sam_export.step.micro_batches import is_divided, split
from sam_export.step.train_step import TrainStep
from sam_export.tracing.state import StateLayout


def multiples_of(
    step: TrainStep,
    layout: BatchLayout,
    values: Sequence[Tensor],
    dims: Sequence[Mapping[int, str]],
) -> dict[str, int]:
    """Symbolic size to the number that divides it: the batch's, in a step with several parts.

    Args:
        step: With its number of parts.
        layout: Names of the batch.
        values: An example batch.
        dims: Per tensor: dimension to the name of its symbolic size.

    Raises:
        StepConfigError: By its size a tensor belongs to the examples, and by its mark it does not,
            or the other way round; or two tensors that are divided have other names for the size.
    """
    count = step.semantics.micro_batches
    if count == 1:
        return {}
    split(layout.names, values, count)  # refuses a size that is no multiple
    symbol = dims[0].get(0)
    for name, value, marks in zip(layout.names, values, dims, strict=True):
        if is_divided(value, values[0]) != (value.dim() > 0 and marks.get(0) == symbol):
            where = f"{layout.names[0]!r} has {symbol!r} there, {name!r} {marks.get(0)!r}"
            size = value.shape[0] if value.dim() else "none"
            raise StepConfigError(
                f"micro_batches={count} divides each tensor whose dimension 0 is that of "
                f"{layout.names[0]!r}, here {values[0].shape[0]}; {name!r} has {size}, but by "
                f"dynamic={{...}} ({where}) it is to be the other way. Mark both alike, or take an "
                "example batch in which other sizes are not that of the batch by chance."
            )
    return {} if symbol is None else {symbol: count}


def smallest_sizes(
    step: TrainStep,
    layout: BatchLayout,
    state: StateLayout,
    values: Sequence[Tensor],
    dims: Sequence[Mapping[int, str]],
    multiples: Mapping[str, int],
) -> dict[str, int]:
    """The smallest size that each symbol may take: 2 where the model refuses 1 (BatchNorm).

    A size that is divided into parts has that for each part.
    """
    smallest = {}
    for symbol in sorted({symbol for marks in dims for symbol in marks.values()}):
        fewest = [
            value.narrow(d, 0, 1) if marks.get(d) == symbol else value
            for value, marks in zip(values, dims, strict=True)
            for d in [next((d for d, name in marks.items() if name == symbol), 0)]
        ]
        least = 1 if _accepts(step, layout, state, fewest) else 2
        smallest[symbol] = least * multiples.get(symbol, 1)
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
