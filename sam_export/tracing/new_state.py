"""What a program that trains leaves behind: the new value of every state tensor."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sam_export.artifact.contract import (
    AVERAGE,
    GROWTH_TRACKER,
    NEXT,
    SCALE,
    SEED,
    STARTED,
    STEP,
    Role,
)
from sam_export.step.loss_scaling import Scaler
from sam_export.step.train_step import TrainStep
from sam_export.tracing.state import StateLayout

Produced = tuple[str, Role, Tensor]
"""One output of a traced function: its name, role and (fake) value."""


def scaler_of(step: TrainStep, given: Mapping[str, Tensor]) -> Scaler | None:
    """The scale of the loss, out of all state; None without loss scaling."""
    if step.loss_scaling is None:
        return None
    return Scaler(step.loss_scaling, given[SCALE], given[GROWTH_TRACKER])


def new_state(
    step: TrainStep,
    layout: StateLayout,
    given: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    finite: Tensor,
    scaler: Scaler | None,
) -> list[Produced]:
    """The outputs ``next.<name>`` for all state, in order.

    Args:
        step: Whose state.
        layout: Its order.
        given: All state before.
        after: New parameters, buffers, slots and memories by name in the contract.
        finite: Scalar bool: whether the step is.
        scaler: The scale of the loss in this step.
    """
    after = dict(after)
    if step.ema is not None:
        averages = step.ema.after(layout.averages(given), after)
        after |= {AVERAGE + name: value for name, value in averages.items()}
    if STARTED in given:
        after[STARTED] = given[STARTED].clamp(min=1)  # a reader: it is written last
    if scaler is not None:
        after[SCALE], after[GROWTH_TRACKER] = scaler.after(finite)
    if SEED in given:
        after[SEED] = given[SEED]
    if STEP in given:
        after[STEP] = given[STEP] + 1
    return [(NEXT + spec.name, spec.role, after[spec.name]) for spec in layout.specs]
