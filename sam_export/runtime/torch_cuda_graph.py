"""A step of torch's that is recorded as a CUDA graph and replayed. **Never yet run on a GPU.**

`torch.cuda.CUDAGraph` records the kernels that a function launches, with the addresses that they
read and write, and launches all of them at once when it is replayed. A step writes its state in
place, so state and hyper-parameters are where they were. A batch is copied into tensors of the
recording's own, and results are copied out of them, so that they stay valid after later steps.
Recording computes nothing, but the runs that have to come before it do (they compile kernels, and
let libraries take their memory): the state is put back after them.

Each shape of a batch has a recording; what is in between lies in memory that all recordings of a
program share, since no two replays overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sam_export.errors import RuntimeUnavailableError
from sam_export.runtime.torch_engine import Program

WARM_UP_RUNS = 3
"""Runs before a recording; torch's own documentation takes as many."""

Record = Callable[
    [Callable[[], Sequence[Tensor]], torch.device], tuple[Callable[[], None], Sequence[Tensor]]
]
"""Records a function; returns what replays it, and the tensors that a replay fills."""


@dataclass(frozen=True)
class _Recording:
    batch: list[Tensor]
    replay: Callable[[], None]
    results: Sequence[Tensor]


class CudaGraphs:
    """Records functions as CUDA graphs that take what is in between from one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None  # a pool's free blocks are those of the stream that freed them

    def __call__(
        self, run: Callable[[], Sequence[Tensor]], device: torch.device
    ) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """Runs ``run`` a few times, then records it.

        Args:
            run: Launches the same kernels, on the same addresses, at every call.
            device: Where.

        Returns:
            What replays it on the current stream, and the tensors that it fills then.

        Raises:
            RuntimeError: torch's own: something in it waits for the device, or reads host memory.
        """
        with torch.cuda.device(device):
            if self._pool is None:
                # A recording cannot be made on the default stream, and the one that
                # `torch.cuda.graph` makes by itself is of the first device that it is used on.
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            current, side = torch.cuda.current_stream(), self._stream
            side.wait_stream(current)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.stream(side):
                    for _ in range(WARM_UP_RUNS):
                        run()
                # Other threads (one that pins memory) may go on calling CUDA.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
                ):
                    results = run()
            finally:
                torch.cuda.set_stream(current)  # which a recording that fails does not do
                current.wait_stream(side)
        return graph.replay, results


class RecordedProgram:
    """A program that is recorded at its first run with a shape of batch, and replayed then.

    Args:
        program: Writes the state in place; draws nothing from torch's generators.
        prepare: Sees the tensors of a new recording's batch before they are used.
        record: Records a function; None: `CudaGraphs`.

    Raises:
        RuntimeUnavailableError: The program cannot be recorded; the state is as it was.
    """

    def __init__(
        self,
        program: Program,
        prepare: Callable[[list[Tensor]], None],
        record: Record | None = None,
    ) -> None:
        self._program = program
        self._prepare = prepare
        self._record = record or CudaGraphs()
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}

    def __call__(
        self, state: list[Tensor], hyper: list[Tensor], batch: list[Tensor]
    ) -> list[Tensor]:
        """Takes one step; the results are the caller's own."""
        shapes = tuple(tensor.shape for tensor in batch)
        recording = self._recordings.get(shapes)
        if recording is None:
            recording = self._recordings[shapes] = self._new(state, hyper, batch)
        else:
            for fixed, tensor in zip(recording.batch, batch, strict=True):
                fixed.copy_(tensor)
        recording.replay()
        return [result.clone() for result in recording.results]

    def _new(self, state: list[Tensor], hyper: list[Tensor], batch: list[Tensor]) -> _Recording:
        fixed = [tensor.clone() for tensor in batch]
        self._prepare(fixed)
        before = [tensor.clone() for tensor in state]
        try:
            replay, results = self._record(
                lambda: self._program(state, hyper, fixed), state[0].device
            )
        except RuntimeError as error:
            raise RuntimeUnavailableError(
                f"torch {torch.__version__} cannot record the step as a CUDA graph: {error}. Load "
                "it without CudaOptions(cuda_graph=True)."
            ) from error
        finally:
            for tensor, old in zip(state, before, strict=True):
                tensor.copy_(old)
        return _Recording(fixed, replay, results)
