"""A step whose model is on another device is traced on the CPU, as every step is.

A graph knows no device but that of its tensors, so one that was traced on the CPU runs on any. What
eager launches on a GPU (cuDNN's operators, fused ones) is nothing that every target has.

A trace puts its own parameters, buffers and batch in place of the model's (`step.call`), and those
are on the CPU. What is left are constants: tensors that a module holds beside them, and the loss's
own. No copy of the model is traced: a loss or a hook that reaches into the model would read the
original's weights, and their gradient would be lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from sam_export._compat import tracing
from sam_export.errors import StepConfigError
from sam_export.step.train_step import TrainStep


@contextlib.contextmanager
def constants_on_cpu(step: TrainStep) -> Iterator[None]:
    """While it is open, tensors that modules of the model and of the loss hold are on the CPU.

    Parameters and buffers of the model stay where they are.

    Raises:
        StepConfigError: The model is on another device, and the step has autocast, whose list of
            operators is another one on each device.
    """
    devices = {str(tensor.device) for tensor in step.model.parameters()} - {"cpu"}
    if devices and step.autocast is not None:
        raise StepConfigError(
            f"The model is on {', '.join(sorted(devices))} and the step has autocast, which "
            "casts for other operators there than on the CPU; a graph is traced on the CPU. Move "
            "the model with model.cpu(), make the step again, and compare with that step; the "
            "graph then runs on CUDA with the casts of the CPU."
        )
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for held in _holders(step):
            for name, value in held.items():
                if isinstance(value, Tensor) and value.device.type != "cpu":
                    swapped.append((held, name, value))
                    held[name] = tracing.on_cpu(value)
        yield
    finally:
        for held, name, value in swapped:
            held[name] = value


def _holders(step: TrainStep) -> Iterator[dict[str, Any]]:
    yield from map(vars, step.model.modules())
    for part in step.loss_fn.modules() if isinstance(step.loss_fn, nn.Module) else ():
        yield vars(part)
        yield part._buffers
        yield part._parameters
