"""A step on another device is traced from a copy on the CPU."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sam_export as sx
from sam_export.errors import CaptureError, StepConfigError
from sam_export.tracing.on_cpu import copy_on_cpu, on_cpu, tensors_of


class Model(nn.Module):
    """Tied weights, statistics, a tensor that is no buffer, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.2)
        self.shift = torch.linspace(0, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.first(x) + self.shift))
        return self.second(x)  # type: ignore[no-any-return]


def make(**options: Any) -> sx.TrainStep:
    torch.manual_seed(0)
    model = Model()
    sam = sx.SAM(model.parameters(), torch.optim.AdamW, lr=0.01, every=2, variant=sx.LookSAM())
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0]))
    return sx.TrainStep(model, loss, sam, seed=3, **options)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 3, 0, 1])


def test_the_graphs_of_a_copy_are_those_of_the_step() -> None:
    """In the middle of a run: slots, memories, averages, numbers go along."""
    step = make(ema=sx.EMA(0.9))
    for _ in range(3):
        step(*batch())
    copied = copy_on_cpu(step)
    first, second = (sx.capture(each, batch(), staged=False) for each in (step, copied))
    assert second.contract == first.contract
    for name, value in first.state.items():
        np.testing.assert_array_equal(second.state[name], value, err_msg=name)
    assert int(first.state["counter.step"]) == 3
    for name, program in first.programs.items():
        assert second.programs[name].graph_module.code == program.graph_module.code, name


def test_a_copy_shares_no_memory_and_holds_together() -> None:
    step = make()
    step(*batch())
    copied = copy_on_cpu(step)
    before = {tensor.data_ptr() for tensor in tensors_of(step)}
    after = list(tensors_of(copied))
    assert len(after) == len(list(tensors_of(step)))
    assert not before & {tensor.data_ptr() for tensor in after}
    assert copied.model.second.weight is copied.model.first.weight
    held = [p for group in copied.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in copied.model.parameters()}
    assert copied.optimizer.state is copied.optimizer.base_optimizer.state
    assert set(copied.optimizer.state) == set(held)


def test_a_step_on_the_cpu_is_traced_itself() -> None:
    step = make()
    assert on_cpu(step) is step


def on_a_pretended_gpu(step: sx.TrainStep) -> sx.TrainStep:
    """With fake tensors of a device that is not there."""
    for part in (step.model, step.loss_fn):
        for module in part.modules():
            for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
                if isinstance(value, Tensor):
                    fake = torch.empty(value.shape, dtype=value.dtype, device="cuda:0")
                    is_parameter = isinstance(value, nn.Parameter)
                    setattr(module, name, nn.Parameter(fake) if is_parameter else fake)
    step.model.second.weight = step.model.first.weight
    sam = sx.SAM(step.model.parameters(), torch.optim.SGD, lr=0.1)
    return sx.TrainStep(step.model, step.loss_fn, sam, autocast=step.autocast)


def test_all_of_a_step_comes_to_the_cpu() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = on_a_pretended_gpu(make())
        assert {str(tensor.device) for tensor in tensors_of(step)} == {"cuda:0"}
        copied = on_cpu(step)
        assert {str(tensor.device) for tensor in tensors_of(copied)} == {"cpu"}
        assert {str(tensor.device) for tensor in tensors_of(step)} == {"cuda:0"}


def test_autocast_of_another_device_is_refused() -> None:
    """Its list of operators is another one, so the graph would not be what eager does."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = on_a_pretended_gpu(make(autocast=torch.bfloat16))
        with pytest.raises(StepConfigError, match=r"on cuda:0 and the step has autocast"):
            on_cpu(step)


def test_a_step_that_cannot_be_copied_says_what_to_do() -> None:
    step = make()
    step.model.lock = threading.Lock()
    with pytest.raises(CaptureError, match=r"(?s)cannot be copied.*lock.*model\.cpu\(\)"):
        copy_on_cpu(step)
