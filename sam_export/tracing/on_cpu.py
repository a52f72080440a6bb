"""A step whose model is on another device, as a copy on the CPU: all graphs are traced there.

A graph knows no device but that of its tensors, so one that was traced on the CPU runs on any. What
eager launches on a GPU (cuDNN's operators, fused ones) is nothing that every target has.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sam_export.errors import CaptureError, StepConfigError
from sam_export.step.train_step import TrainStep


def on_cpu(step: TrainStep) -> TrainStep:
    """``step`` itself where all its tensors are on the CPU, else a copy whose tensors are.

    Raises:
        StepConfigError: It has autocast, whose list of operators is another one on each device.
        CaptureError: The model, the loss or the optimizer cannot be copied.
    """
    elsewhere = {str(tensor.device) for tensor in tensors_of(step)} - {"cpu"}
    if not elsewhere:
        return step
    if step.autocast is not None:
        raise StepConfigError(
            f"The model is on {', '.join(sorted(elsewhere))} and the step has autocast, which "
            "casts for other operators there than on the CPU; a graph is traced on the CPU. Move "
            "the model with model.cpu(), make the step again, and compare with that step; the "
            "graph then runs on CUDA with the casts of the CPU."
        )
    return copy_on_cpu(step)


def copy_on_cpu(step: TrainStep) -> TrainStep:
    """A copy of ``step``, of its model, its loss and its optimizer, with all tensors on the CPU.

    Nothing is copied on the device that they are on.

    Raises:
        CaptureError: Something cannot be copied.
    """
    # What `copy.deepcopy` finds in its memo it takes for the copy.
    memo: dict[int, Any] = {id(tensor): _copied(tensor) for tensor in tensors_of(step)}
    base = step.optimizer.base_optimizer
    try:
        twin = copy.deepcopy(step, memo)
        # A copy of a torch optimizer leaves out what a class of somebody else's keeps of its own.
        for name, value in vars(base).items():
            if name not in vars(twin.optimizer.base_optimizer):
                setattr(twin.optimizer.base_optimizer, name, copy.deepcopy(value, memo))
    except Exception as error:
        raise CaptureError(
            f"The step is traced from a copy on the CPU, and cannot be copied: {error}. Move the "
            "model to the CPU with model.cpu() and make the step again."
        ) from error
    return twin


def tensors_of(step: TrainStep) -> Iterator[Tensor]:
    """Every tensor that ``step`` holds; one that is held twice comes twice."""
    optimizer = step.optimizer
    for module in (step.model, step.loss_fn):
        for part in module.modules() if isinstance(module, nn.Module) else ():
            yield from part.parameters(recurse=False)
            yield from part.buffers(recurse=False)
            yield from _tensors(vars(part))
    yield from _tensors(step.averages)
    holders: list[Mapping[Any, Any]] = [*optimizer.state.values(), *optimizer.param_groups]
    holders += [*optimizer.memory.values(), optimizer._w, optimizer._g]
    for held in holders:
        yield from _tensors(held)


def _tensors(held: Mapping[Any, Any]) -> Iterator[Tensor]:
    return (value for value in held.values() if isinstance(value, Tensor))


def _copied(tensor: Tensor) -> Tensor:
    value = tensor.detach().to("cpu", copy=True)
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
    for name, attribute in vars(tensor).items():
        if name not in vars(value):
            setattr(value, name, attribute)
    return value.requires_grad_(tensor.requires_grad)
