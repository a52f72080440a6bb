"""How much memory the process takes that runs a step on ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sam_export as sx
from sam_export.runtime.detect import target_status

RUN = """
import sys
from pathlib import Path
import numpy as np
import sam_export as sx

session = sx.load(sys.argv[1], threads=1)
x, y = np.ones((16384, 16), np.float32), np.zeros(16384, np.int64)

def whole():
    session.step(x, y)

def stages():
    ascent = session.ascent(x, y)
    session.update(session.descent(x, y, gradients=ascent.gradients).gradients)

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

before = peak()
for _ in range(2):
    {"whole": whole, "stages": stages}[sys.argv[2]]()
print(peak() - before)
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small weights, and activations of 16 MiB a layer."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak memory of a process is read from /proc")
    if missing := target_status("onnx").run:
        pytest.skip(f"onnx needs {missing[0].what}")
    torch.manual_seed(0)
    layers = [nn.Linear(16, 256), *[nn.Tanh(), nn.Linear(256, 256)] * 2, nn.Linear(256, 3)]
    model = nn.Sequential(*layers)
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam)
    captured = sx.capture(step, (torch.ones(4, 16), torch.zeros(4, dtype=torch.int64)), staged=True)
    return sx.export(captured, tmp_path_factory.mktemp("memory") / "step", "onnx").path


def test_stages_take_little_more_than_the_whole_step(artifact: Path) -> None:
    """The activations of the two passes lie in the same memory, one after the other."""
    kib = {
        way: int(
            subprocess.run(
                [sys.executable, "-c", RUN, str(artifact), way],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for way in ("whole", "stages")
    }
    assert kib["whole"] > 50_000
    assert kib["stages"] < 1.25 * kib["whole"], kib
