"""Torch's targets on an NVIDIA GPU. **Never yet run on one**: skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sam_export as sx
from sam_export.runtime.cuda_options import CudaOptions
from sam_export.runtime.detect import target_status
from tests.runtime.target_cases import images, make

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="this machine has no NVIDIA GPU that torch can use"
)


def on_gpu() -> sx.TrainStep:
    """The step of `make`, its model and its optimizer's slots on the GPU."""
    step = make(torch.float32, "sgd")
    step.model.to("cuda")
    step(*(tensor.cuda() for tensor in images(6, torch.float32)))
    return step


def test_a_step_on_a_gpu_is_captured_as_on_the_cpu() -> None:
    step, here = on_gpu(), make(torch.float32, "sgd")
    batch = images(6, torch.float32)
    there = sx.capture(step, tuple(tensor.cuda() for tensor in batch))
    expected = sx.capture(here, batch)
    assert there.contract == expected.contract
    for name, program in expected.programs.items():
        assert there.programs[name].graph_module.code == program.graph_module.code, name
    assert next(step.model.parameters()).is_cuda


@pytest.mark.parametrize("target", ["torch-compile", "torchscript", "aot-inductor"])
def test_parity_with_eager_on_the_gpu(target: str) -> None:
    if missing := target_status(target).run:
        pytest.skip(f"{target} needs {missing[0].what}")
    options = [None, CudaOptions(cuda_graph=True)] if target == "torch-compile" else [None]
    batches = [images(count, torch.float32) for count in (6, 4)]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for cuda in options:
            report = sx.check_parity(
                on_gpu(), batches, [target], num_steps=3, device="cuda", isolate=False, cuda=cuda
            )
            assert report.ok, report


def test_autocast_on_the_gpu_is_refused() -> None:
    model = nn.Linear(4, 3).cuda()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam, autocast=torch.bfloat16)
    batch = torch.randn(6, 4, device="cuda"), torch.zeros(6, dtype=torch.int64, device="cuda")
    with pytest.raises(sx.StepConfigError, match="casts for other operators"):
        sx.capture(step, batch)
