"""Two processes that average staged gradients, against one plain loop over the joined batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import sam_export as sx
from sam_export.runtime.detect import target_status

EXAMPLE = Path(__file__).parents[2] / "examples" / "data_parallel.py"
LR, MOMENTUM, DECAY, RHO = 0.1, 0.9, 0.01, 0.05
PROCESSES, BATCH, STEPS = 2, 12, 5


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * BATCH, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (STEPS * BATCH,), generator=generator)


def plain_loop(own_perturbation: bool) -> dict[str, np.ndarray]:
    """SAM over SGD with momentum, written out; ``w`` after all steps.

    With ``own_perturbation`` each process's part of a batch has its own.
    """
    net = model()
    w = {name: value.detach().clone() for name, value in net.named_parameters()}
    v = {name: torch.zeros_like(value) for name, value in w.items()}

    def gradient(at: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
        loss = nn.functional.cross_entropy(functional_call(net, leaves, (x,)), y)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def adversarial(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        g = gradient(w, x, y)
        norm = torch.sqrt(sum((value**2).sum() for value in g.values()))
        return gradient({n: w[n] + RHO * g[n] / (norm + 1e-12) for n in w}, x, y)

    xs, ys = examples()
    for x, y in zip(xs.split(BATCH), ys.split(BATCH), strict=True):
        count = PROCESSES if own_perturbation else 1
        parts = [adversarial(*part) for part in zip(x.chunk(count), y.chunk(count), strict=True)]
        for name in w:
            g_adv = sum(part[name] for part in parts) / count + DECAY * w[name]
            v[name] = MOMENTUM * v[name] + g_adv
            w[name] = w[name] - LR * v[name]
    return {name: value.numpy() for name, value in w.items()}


@pytest.mark.parametrize("own_perturbation", [False, True])
@pytest.mark.parametrize("target", ["onnx", "torchscript"])
def test_two_processes_are_one(target: str, own_perturbation: bool, tmp_path: Path) -> None:
    """In float64, after five steps with momentum, for both semantics of the perturbation."""
    if missing := target_status(target).run:
        pytest.skip(f"{target} needs {missing[0].what}")
    net = model()
    sam = sx.SAM(
        net.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=MOMENTUM, weight_decay=DECAY
    )
    step = sx.TrainStep(net, nn.CrossEntropyLoss(), sam)
    x, y = examples()
    captured = sx.capture(step, (x[:6], y[:6]), staged=True)
    sx.export(captured, tmp_path / "step", target)
    names = [spec.name for spec in captured.contract.batch]
    np.savez(tmp_path / "data.npz", **dict(zip(names, (x.numpy(), y.numpy()), strict=True)))
    command = [sys.executable, str(EXAMPLE), str(tmp_path / "step"), str(tmp_path / "data.npz")]
    command += ["--batch", str(BATCH), "--out", str(tmp_path / "trained")]
    command += ["--own-perturbation"] * own_perturbation
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES)}
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], said
    session = sx.load(tmp_path / "step")
    start = session.state
    session.restore(tmp_path / "trained")
    assert session.step_count == STEPS
    expected, other = plain_loop(own_perturbation), plain_loop(not own_perturbation)
    for name, value in expected.items():
        moved = np.linalg.norm(value - start[name])
        assert np.linalg.norm(session.state[name] - value) <= 1e-12 * moved, name
        assert np.linalg.norm(other[name] - value) > 1e-4 * moved, name
