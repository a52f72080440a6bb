"""Numbers that a graph computes from a symbolic size have the precision of the tensor they meet."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sam_export as sx

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": nn.MSELoss(),
    "smooth_l1": nn.SmoothL1Loss(),
    "huber": nn.HuberLoss(delta=0.3),
    "variance over the batch": lambda x, y: (x * y).var(0).sum(),
    "one over the size": lambda x, y: (x * y).sum() * (1.0 / x.shape[0]),
    "less one": lambda x, y: (x * y).sum() * (2.0 / (x.shape[0] - 0.5)),
    "power of the size": lambda x, y: (x * y).sum() * x.shape[0] ** -0.5,
    "root of the size": lambda x, y: (x * y).sum() / torch.sym_sqrt(x.shape[0] * 3),
}


def gradient(loss_fn: Any, at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Of the loss of a linear model, in float64."""
    leaf = at.clone().requires_grad_()
    return torch.autograd.grad(loss_fn(x.double() @ leaf.T, y.double()), leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_one_step_is_plain_eager_sam(name: str, dtype: torch.dtype) -> None:
    """For two batch sizes neither of which the capture saw; eager is written out here."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 4, generator=generator, dtype=torch.float64).to(dtype)
    model = nn.Linear(4, 3, bias=False).to(dtype)
    model.load_state_dict({"weight": w})
    loss_fn: Any = LOSSES[name]
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    step = sx.TrainStep(model, loss_fn, sam)
    batch = [torch.randn(5, n, generator=generator, dtype=torch.float64).to(dtype) for n in (4, 3)]
    session = sx.load(sx.capture(step, tuple(batch)), target="onnx")
    for size in (3, 7):
        x, y = (torch.randn(size, n, generator=generator, dtype=torch.float64) for n in (4, 3))
        x, y = x.to(dtype), y.to(dtype)
        session.set_state({"weight": w.numpy()})
        session.step(x, y)

        wide = w.double()
        first = gradient(loss_fn, wide, x, y)
        expected = -0.1 * gradient(loss_fn, wide + 0.05 * first / first.norm(), x, y)
        found = session.state["weight"].astype(np.float64) - wide.numpy()
        error = np.linalg.norm(found - expected.numpy()) / float(expected.norm())
        # The change of a float32 weight is stored to eps times weight over change.
        allowed = 1e-13 if dtype == torch.float64 else 1e-7 * float(w.norm() / expected.norm()) * 4
        assert error < allowed, (size, error)
        assert not math.isnan(error)


@pytest.mark.parametrize("target", ["onnx", "onnx-training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_instance_norm_has_a_symbolic_number_of_channels(
    dtype: torch.dtype, target: str
) -> None:
    """ATen has it as a BatchNorm over ``N * C`` channels."""
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    sam = sx.SAM(model.to(dtype).parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam)
    batches = [(torch.randn(n, 2, 6, 6, dtype=dtype), torch.randint(3, (n,))) for n in (5, 3)]
    report = sx.check_parity(step, batches, targets=[target], num_steps=3, isolate=False)
    assert report.ok, str(report)
