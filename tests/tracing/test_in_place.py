"""New state over old, where one state tensor becomes another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sam_export.artifact.contract import ProgramSpec, TensorSpec
from sam_export.tracing.in_place import in_place

NAMES = ("w", "previous")
SPEC = ProgramSpec(
    "step",
    (*NAMES, "x"),
    (
        TensorSpec("finite", "metric", "bool", ()),
        *(TensorSpec(f"next.{name}", "slot", "float32", (2,)) for name in NAMES),
    ),
    {f"next.{name}": name for name in NAMES},
)


def step(w: Tensor, previous: Tensor, x: Tensor) -> list[Tensor]:
    """The old weights are kept as they were: an input of the graph is an output."""
    return [torch.isfinite(x), w + x, w]


@pytest.mark.parametrize("guarded", [True, False])
def test_old_values_are_read_before_they_are_overwritten(guarded: bool) -> None:
    state = [torch.zeros(2), torch.full((2,), 7.0)]
    run = in_place(step, SPEC, list(SPEC.feeds) if guarded else [], set())
    for count in (1, 2, 3):
        run(state, [], [torch.tensor(1.0)])
        assert state[0].tolist() == [count, count]
        assert state[1].tolist() == [count - 1, count - 1]
    run(state, [], [torch.tensor(float("nan"))])
    assert torch.isfinite(state[0]).all() == guarded
