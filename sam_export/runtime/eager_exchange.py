"""The state of a session into an eager model and optimizer, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_export.artifact.contract import (
    AVERAGE,
    GROWTH_TRACKER,
    SCALE,
    SEED,
    STARTED,
    STEP,
    StepContract,
)
from sam_export.runtime.batches import merged_hyper
from sam_export.runtime.eager_state import EagerState, host_array, parts_of, refuse_other_step

Hyper = Mapping[str, tuple[float, ...]]
State = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Progress:
    """What a session holds beside its state.

    Attributes:
        hyper: Hyper-parameters, one value per parameter group.
        step_count: Steps so far.
        number: The number of the next step in periodic SAM.
    """

    hyper: Hyper
    step_count: int
    number: int


@dataclass(frozen=True)
class FromEager:
    """What an eager model and optimizer hold.

    Attributes:
        state: Every state tensor of the contract.
        hyper: Hyper-parameters, one value per parameter group.
        step_count: Steps so far; None where only a `TrainStep` would know.
    """

    state: dict[str, NDArray[Any]]
    hyper: dict[str, tuple[float, ...]]
    step_count: int | None


def write_eager(
    contract: StepContract, state: State, progress: Progress, model: Any, optimizer: Any
) -> None:
    """See `Session.load_into`.

    Raises:
        SessionError: A name, shape, dtype, parameter group or slot differs.
    """
    import torch

    model, optimizer, step = parts_of(model, optimizer)
    refuse_other_step(contract, step)
    eager = EagerState(contract, model, optimizer)
    made = {spec.name: eager.new_slot(spec, p) for spec, p, old in eager.slots if old is None}
    with torch.no_grad():
        for name, tensor in eager.tensors.items():
            tensor.data.copy_(torch.tensor(state[name]))
        for spec, parameter, old in eager.slots:
            if state.get(STARTED) == 0:  # eager tells its first update by having no slots
                eager.base.state.get(parameter, {}).pop(spec.slot, None)
                continue
            value = made[spec.name] if old is None else old
            if isinstance(value, torch.Tensor):
                value.data.copy_(torch.tensor(state[spec.name]))
            else:
                value = type(value)(state[spec.name].item())
            eager.base.state[parameter][spec.slot] = value
        for spec, parameter, _ in eager.memories:
            if state.get(STARTED) == 0:
                eager.sam.memory.pop(parameter, None)
                continue
            kept = torch.tensor(state[spec.name]).to(parameter)
            eager.sam.memory.setdefault(parameter, {})[spec.slot] = kept
        for name, index, group, key in eager.settings:
            if isinstance(group[key], torch.Tensor):
                group[key].fill_(progress.hyper[name][index])
            else:
                group[key] = progress.hyper[name][index]
    if eager.sam is not None and contract.every > 1:
        eager.sam.count = progress.number
    if step is not None:
        step.step_count = int(state.get(STEP, progress.step_count))
        step.seed = int(state.get(SEED, step.seed))
        for name, average in step.averages.items():
            average.copy_(torch.tensor(state[AVERAGE + name]))
        if SCALE in state:
            step.loss_scale = float(state[SCALE])
            step.growth_tracker = int(state[GROWTH_TRACKER])


def read_eager(
    contract: StepContract,
    current: Hyper,
    first_slots: State,
    read: Callable[[Sequence[str]], State],
    model: Any,
    optimizer: Any,
) -> FromEager:
    """See `Session.load_from`.

    Args:
        contract: The session's.
        current: Its hyper-parameters, for those that eager does not have.
        first_slots: Slots as they were in the artifact, for those that eager has not made yet.
        read: Reads the session's state, for what eager does not have.
        model: A model, or a `TrainStep`.
        optimizer: Of the model.

    Raises:
        SessionError: A name, shape, dtype, parameter group, slot or hyper-parameter differs.
    """
    model, optimizer, step = parts_of(model, optimizer)
    refuse_other_step(contract, step)
    eager = EagerState(contract, model, optimizer)
    hyper = {spec.name: list(current[spec.name]) for spec in contract.hyper}
    for name, index, group, key in eager.settings:
        hyper[name][index] = float(group[key])
    values = merged_hyper(current, hyper, contract)
    state = {name: host_array(tensor) for name, tensor in eager.tensors.items()}
    for spec, _, value in eager.slots:
        found = first_slots[spec.name] if value is None else value
        state[spec.name] = host_array(found).astype(spec.dtype)
    for spec, parameter, value in eager.memories:
        zeros = np.zeros(tuple(parameter.shape), spec.dtype)
        state[spec.name] = zeros if value is None else host_array(value).astype(spec.dtype)
    kept = [spec.name for spec in contract.state if spec.name not in state]
    state.update(read(kept))
    if STARTED in state:
        made = (*eager.slots, *eager.memories)
        state[STARTED] = np.array(int(any(value is not None for _, _, value in made)))
    if STEP in state and eager.sam is not None and contract.every > 1:
        state[STEP] = np.array(eager.sam.count)
    if step is not None:
        numbers = {SEED: step.seed, STEP: step.step_count}
        state.update({n: np.array(v) for n, v in numbers.items() if n in kept})
        state |= {AVERAGE + n: host_array(value) for n, value in step.averages.items()}
        if SCALE in kept:
            state[SCALE] = np.array(step.loss_scale, np.float32)
            state[GROWTH_TRACKER] = np.array(step.growth_tracker)
    return FromEager(state, values, None if step is None else step.step_count)
