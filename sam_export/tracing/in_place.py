"""A captured program as a function that writes the new state over the old."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from sam_export.artifact.contract import ProgramSpec, StepContract


def in_place(
    graph: Callable[..., Sequence[Tensor]],
    spec: ProgramSpec,
    discarded: Collection[str],
    scalars: set[int],
) -> Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor]]:
    """``graph`` with its new state written over the old one; returns the other outputs.

    It ends by copying, which Inductor folds into the update: less memory than returning new state,
    and leaving the state alone when a value is not finite costs nothing.

    Args:
        graph: Flat tensors to flat tensors, without side effects.
        spec: Order of the inputs and outputs, and which output feeds which input.
        discarded: Outputs whose new state is dropped when the output ``finite`` is false.
        scalars: Positions of the state tensors that are held as vectors of one element.
    """
    outputs = [output.name for output in spec.outputs]
    reported = [index for index, name in enumerate(outputs) if name not in spec.feeds]
    written = [
        (index, spec.inputs.index(spec.feeds[name]), name in discarded)
        for index, name in enumerate(outputs)
        if name in spec.feeds
    ]
    finite = outputs.index("finite") if discarded else None

    def run(state: list[Tensor], hyper: list[Tensor], batch: list[Tensor]) -> list[Tensor]:
        given = [value[0] if i in scalars else value for i, value in enumerate(state)]
        results = graph(*given, *hyper, *batch)
        # All new values before the first write: one may be another state tensor, or a view of it.
        values = []
        for index, position, may_drop in written:
            new, old = results[index].reshape(state[position].shape), state[position]
            if finite is not None and may_drop:
                values.append(torch.where(results[finite], new, old))
            else:
                values.append(new.clone())
        # A model may return its own state, which the writes below change.
        kept = [
            results[index].clone()
            if spec.outputs[index].role in ("output", "stage", "running")
            else results[index]
            for index in reported
        ]
        for (_, position, _), value in zip(written, values, strict=True):
            state[position].copy_(value)
        return kept

    return run


def scalar_positions(contract: StepContract, spec: ProgramSpec) -> set[int]:
    """Positions of the state inputs that have no dimension.

    torch 2.13 compiles ``scalar.copy_(new)`` into nothing where ``scalar`` is a float64 input of no
    dimension; so compiled programs take them as vectors of one element.
    """
    shapes: dict[str, Any] = {item.name: item.shape for item in contract.state}
    return {index for index, name in enumerate(spec.inputs) if shapes.get(name) == ()}
