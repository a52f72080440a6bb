"""Makes artifacts that are kept for good, and what they do: ``python -m tests.golden.make NAME``.

A folder ``tests/golden/NAME`` per release. Those that are there are not made anew: that they still
load and train to the same numbers is what `test_golden.py` is for.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import sam_export as sx

TARGETS = ("onnx", "torchscript")
STEPS = 3


def step() -> sx.TrainStep:
    """A little of everything: buffers, slots, draws, groups, an average, parts."""
    torch.manual_seed(0)
    # No bias before BatchNorm: its gradient is rounding, and AdamW makes whole steps of it.
    model = nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3)
    ).double()
    *rest, last = model.parameters()
    optimizer = sx.SAM(
        [{"params": rest}, {"params": [last], "rho": 0.02}],
        torch.optim.AdamW,
        rho=0.05,
        lr=0.01,
        weight_decay=0.1,
        variant=sx.GSAM(),
    )
    semantics = sx.Semantics(clip_norm=1.0, micro_batches=2)
    return sx.TrainStep(
        model, nn.CrossEntropyLoss(), optimizer, semantics=semantics, seed=7, ema=sx.EMA(0.9)
    )


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """The first ones that it trains on."""
    draw = np.random.default_rng(1)
    return [(draw.normal(size=(8, 4)), draw.integers(3, size=8)) for _ in range(STEPS)]


def main(name: str) -> None:
    """Writes the folder."""
    folder = Path(__file__).parent / name
    x, y = batches()[0]
    captured = sx.capture(step(), (torch.from_numpy(x), torch.from_numpy(y)), staged=True)
    for target in TARGETS:
        sx.export(captured, folder / target, target)
    session = sx.load(folder / TARGETS[0])
    session.step(x, y)
    session.save(folder / "after_one_step.ckpt")
    eager = step()
    losses = [float(eager(*map(torch.from_numpy, batch)).loss) for batch in batches()]
    named = {**dict(eager.model.named_parameters()), **dict(eager.model.named_buffers())}
    arrays = {f"state/{n}": value.detach().numpy() for n, value in named.items()}
    arrays |= {f"average/{n}": value.numpy() for n, value in eager.averages.items()}
    inputs = {f"batch/{i}/{j}": v for i, batch in enumerate(batches()) for j, v in enumerate(batch)}
    np.savez(folder / "expected.npz", losses=np.array(losses), **arrays, **inputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
