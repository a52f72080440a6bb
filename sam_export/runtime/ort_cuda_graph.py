"""Steps that ONNX Runtime records as CUDA graphs and replays: everything has a fixed place.

ONNX Runtime records a graph inside the first call of ``run`` that carries a new ``gpu_graph_id``:
it runs the model once or more to let memory settle, runs it again while recording, and replays it
(``InferenceSession::Run``). A step that overwrites its state would so be taken several times. The
state is therefore put back after the recording, and the step taken once, by a replay.

A replay reads and writes the addresses of the recording. So each pair of batch shapes and state
buffers has a recording of its own, with its own number; batches and random numbers are copied into
fixed buffers, and results are written into fixed ones, where the next step overwrites them.
Recordings belong to the thread that made them.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_export.artifact.contract import ProgramSpec
from sam_export.errors import SessionError
from sam_export.runtime.batches import contiguous
from sam_export.runtime.ort_call import OrtCall
from sam_export.runtime.ort_values import OrtValues


@dataclass(frozen=True)
class FixedResult:
    """A result of a recorded step, in a buffer that the next step overwrites.

    Attributes:
        value: The ``OrtValue``.
        step: Which step of the session wrote it, from 1.
    """

    value: Any
    step: int


@dataclass(frozen=True)
class _Recording:
    binding: Any
    inputs: dict[str, Any]
    results: dict[str, Any]
    options: Any


class RecordedSteps:
    """The recordings of one session.

    Args:
        ort: The ``onnxruntime`` module.
        session: Of the program ``step``, made with ``enable_cuda_graph``.
        spec: The program.
        values: Makes values on the device.
        bind_state: Binds state and hyper-parameters; its argument says which of the state's buffers
            are read.
    """

    def __init__(
        self,
        ort: ModuleType,
        session: Any,
        spec: ProgramSpec,
        values: OrtValues,
        bind_state: Callable[[Hashable], Any],
    ) -> None:
        self._ort = ort
        self._session = session
        self._call = OrtCall(spec, ())
        self._values = values
        self._bind_state = bind_state
        self._recordings: dict[Any, _Recording] = {}
        self._numbers = itertools.count(1)  # one that has failed is not used again
        self._steps = 0
        self._thread = threading.get_ident()

    def run(
        self,
        side: Hashable,
        inputs: Mapping[str, Any],
        sizes: Mapping[str, int],
        overwritten: Iterable[Any],
    ) -> dict[str, FixedResult]:
        """Takes one step.

        Args:
            side: Which of the state's buffers it reads.
            inputs: Batch and random numbers by name, as a session takes them.
            sizes: Symbolic size to its value in this batch.
            overwritten: The ``OrtValue``s of the state that the step writes over itself.

        Raises:
            SessionError: Another thread than the one that made the session runs it.
        """
        if threading.get_ident() != self._thread:
            raise SessionError(
                "A session with CudaOptions(cuda_graph=True) steps in the thread that loaded it: "
                "ONNX Runtime keeps a recording for each thread, and would take a step several "
                "times to record it again. Step from that thread, or load without cuda_graph."
            )
        arrays = {name: contiguous(value) for name, value in inputs.items()}
        key = (side, tuple((name, array.shape) for name, array in arrays.items()))
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._new(side, arrays, sizes)
            kept = [(value, np.array(value.numpy())) for value in overwritten]
            try:
                self._replay(recording)
            finally:
                for value, before in kept:
                    value.update_inplace(before)
            self._recordings[key] = recording
        else:
            for name, array in arrays.items():
                recording.inputs[name].update_inplace(array)
        self._replay(recording)
        self._steps += 1
        return {name: FixedResult(value, self._steps) for name, value in recording.results.items()}

    def read(self, result: FixedResult) -> NDArray[Any]:
        """A host copy of a result.

        Raises:
            SessionError: A later step has overwritten it.
        """
        if result.step != self._steps:
            raise SessionError(
                f"A result of step {result.step} of this session was read after step "
                f"{self._steps}: with CudaOptions(cuda_graph=True) a step writes its results where "
                "the last one did. Read results before the next step, or load without cuda_graph."
            )
        return np.array(result.value.numpy())

    def _new(
        self, side: Hashable, arrays: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]
    ) -> _Recording:
        binding = self._bind_state(side)
        inputs = {name: self._values.of(np.array(array)) for name, array in arrays.items()}
        self._values.bind_inputs(binding, inputs)
        results = self._call.bind_results(binding, self._values, sizes)
        options = self._ort.RunOptions()
        # 0 is the number of runs that give none, -1 forbids recording.
        options.add_run_config_entry("gpu_graph_id", str(next(self._numbers)))
        return _Recording(binding, inputs, results, options)

    def _replay(self, recording: _Recording) -> None:
        self._session.run_with_iobinding(recording.binding, recording.options)
