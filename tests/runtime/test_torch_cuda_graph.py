"""Recorded steps of `torch-compile`, over a stand-in for CUDA graphs that runs on the CPU.

The stand-in does what `torch.cuda.CUDAGraph` does, as far as the code round it can tell: runs come
before a recording and change the state, a replay reads and writes what the recording did, and the
results are the same tensors each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import sam_export as sx
from sam_export.errors import RuntimeUnavailableError, SessionError
from sam_export.runtime import torch_compile
from sam_export.runtime.cuda_options import CudaOptions
from sam_export.runtime.torch_cuda_graph import RecordedProgram
from tests.runtime.target_cases import images, make


class StandIn:
    """Records on the CPU."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0
        self.fails = False

    def __call__(
        self, run: Callable[[], Sequence[Tensor]], device: torch.device
    ) -> tuple[Callable[[], None], Sequence[Tensor]]:
        self.recorded += 1
        for _ in range(3):
            run()
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        results = [torch.full_like(result, float("nan")) for result in run()]

        def replay() -> None:
            self.replayed += 1
            for fixed, result in zip(results, run(), strict=True):
                fixed.copy_(result)

        return replay, results


def program(state: list[Tensor], hyper: list[Tensor], batch: list[Tensor]) -> list[Tensor]:
    """``w <- w + lr * sum(x)``; the loss is the old ``w``."""
    (w,), (lr,), (x,) = state, hyper, batch
    loss = w.clone()
    w += lr * x.sum()
    return [loss]


def recorded() -> tuple[RecordedProgram, StandIn, list[list[Tensor]]]:
    stand_in, prepared = StandIn(), []
    return RecordedProgram(program, prepared.append, stand_in), stand_in, prepared


def test_each_call_is_one_step() -> None:
    run, stand_in, prepared = recorded()
    state, hyper = [torch.zeros(1)], [torch.ones(1)]
    expected = 0.0
    for count in (4, 4, 2, 4, 2):
        x = torch.full((count,), 0.5)
        (loss,) = run(state, hyper, [x])
        assert float(loss) == expected
        expected += count * 0.5
        assert float(state[0]) == expected
    assert (stand_in.recorded, stand_in.replayed) == (2, 5)
    assert [batch[0].shape[0] for batch in prepared] == [4, 2]


def test_new_batches_and_hyper_parameters_are_read() -> None:
    run, _, prepared = recorded()
    state, hyper = [torch.zeros(1)], [torch.ones(1)]
    given = torch.ones(3)
    run(state, hyper, [given])
    assert prepared[0][0].data_ptr() != given.data_ptr()  # the caller's may be freed
    hyper[0].fill_(10)
    run(state, hyper, [torch.full((3,), 2.0)])
    assert float(state[0]) == 3 + 60


def test_results_stay_valid_after_later_steps() -> None:
    run, _, _ = recorded()
    state, hyper = [torch.zeros(1)], [torch.ones(1)]
    losses = [run(state, hyper, [torch.ones(2)])[0] for _ in range(3)]
    assert [float(loss) for loss in losses] == [0, 2, 4]


def test_a_step_that_cannot_be_recorded_changes_nothing() -> None:
    run, stand_in, _ = recorded()
    state, hyper = [torch.ones(1)], [torch.ones(1)]
    stand_in.fails = True
    with pytest.raises(RuntimeUnavailableError, match="cannot record the step.*not permitted"):
        run(state, hyper, [torch.ones(2)])
    assert float(state[0]) == 1
    stand_in.fails = False
    run(state, hyper, [torch.ones(2)])
    assert float(state[0]) == 3


def asked_for_a_graph(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Makes sessions on the CPU follow ``cuda_graph``, over the stand-in."""
    stand_in = StandIn()
    monkeypatch.setattr(
        "sam_export.runtime.torch_engine.cuda_options",
        lambda *_, **__: CudaOptions(cuda_graph=True),
    )

    def make_recorded(*arguments: Any) -> RecordedProgram:
        return RecordedProgram(*arguments, record=stand_in)

    monkeypatch.setattr(torch_compile, "RecordedProgram", make_recorded)
    return stand_in


def test_a_session_records_its_step_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = sx.capture(make(torch.float64, "sgd"), images(6, torch.float64))
    plain = sx.load(captured, target="torch-compile", threads=1)
    stand_in = asked_for_a_graph(monkeypatch)
    session = sx.load(captured, target="torch-compile", threads=1)
    results = []
    for count in (6, 6, 4, 6):
        batch = images(count, torch.float64, seed=len(results))
        lr = 0.1 / (1 + len(results))
        results.append((session.step(*batch, lr=lr), plain.step(*batch, lr=lr)))
    for ours, theirs in results:
        assert float(ours.loss) == pytest.approx(float(theirs.loss), rel=1e-12)
    for name, value in plain.state.items():
        assert session.state[name] == pytest.approx(value, rel=1e-10, abs=1e-12), name
    assert (stand_in.recorded, stand_in.replayed) == (2, 4)
    session.evaluate(batch[0])
    assert stand_in.replayed == 4


def test_torchs_own_generator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for_a_graph(monkeypatch)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))
    sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    semantics = sx.Semantics(generator="torch")
    step = sx.TrainStep(model, torch.nn.CrossEntropyLoss(), sam, semantics=semantics)
    batch = torch.randn(4, 3), torch.randint(0, 3, (4,))
    session = sx.load(sx.capture(step, batch), target="torch-compile", threads=1)
    with pytest.raises(SessionError, match="torch's own generator.*philox"):
        session.step(*batch)
