"""A session over a base optimizer whose first update is a special one: SGD with dampening."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sam_export as sx

STARTED = "counter.started"


def made(seed: int = 0) -> sx.TrainStep:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.3)
    return sx.TrainStep(model, nn.CrossEntropyLoss(), sam)


def data(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(6, 5, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (6,), generator=generator),
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dampening") / "artifact"
    sx.export(sx.capture(made(), data(1)[0]), path, target="onnx")
    return path


def agrees(session: sx.Session, step: sx.TrainStep) -> bool:
    return all(
        np.abs(session.state[name] - p.detach().numpy()).max() < 1e-13
        for name, p in step.model.named_parameters()
    )


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_an_eager_run_goes_on_in_a_session_and_back(folder: Path, steps_before: int) -> None:
    session, step, fresh = sx.load(folder), made(seed=7), made(seed=8)
    batches = data(6)
    for batch in batches[:steps_before]:
        step(*batch)
    session.load_from(step)
    assert session.state[STARTED] == min(steps_before, 1)
    session.load_into(fresh)
    assert bool(fresh.optimizer.base_optimizer.state_dict()["state"]) == (steps_before > 0)
    for batch in batches[steps_before:]:
        step(*batch)
        session.step(*batch)
        fresh(*batch)
        assert agrees(session, step)
        assert agrees(session, fresh)


def test_a_first_step_that_is_skipped_was_none(folder: Path, tmp_path: Path) -> None:
    """Nor after a restart."""
    session, step = sx.load(folder), made()
    x, y = data(1)[0]
    assert not session.step(torch.full_like(x, torch.inf), y).finite
    assert session.state[STARTED] == 0
    session.save(tmp_path / "checkpoint")
    again = sx.load(folder)
    again.restore(tmp_path / "checkpoint")
    for batch in data(3):
        again.step(*batch)
        step(*batch)
        assert agrees(again, step)
