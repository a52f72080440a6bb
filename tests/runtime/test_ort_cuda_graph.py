"""Recorded steps over a session that records as ONNX Runtime does: the state moves by one step."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sam_export.artifact.contract import ProgramSpec, TensorSpec
from sam_export.errors import SessionError
from sam_export.runtime.ort_cuda_graph import RecordedSteps
from sam_export.runtime.ort_values import OrtValues

RUNS_TO_RECORD = 3


class Value:
    """An ``OrtValue``: memory of its own."""

    def __init__(self, array: Any) -> None:
        self.memory = np.array(array)

    @classmethod
    def ortvalue_from_numpy(cls, array: Any, kind: str, index: int) -> Value:
        return cls(array)

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape: Any, dtype: Any, kind: str, index: int) -> Value:
        return cls(np.zeros(shape, dtype))

    def numpy(self) -> Any:
        return self.memory.copy()

    def update_inplace(self, array: Any) -> None:
        assert self.memory.shape == array.shape
        self.memory[...] = array


class Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, Value] = {}
        self.outputs: dict[str, Value] = {}

    def bind_ortvalue_input(self, name: str, value: Value) -> None:
        self.inputs[name] = value

    def bind_ortvalue_output(self, name: str, value: Value) -> None:
        self.outputs[name] = value


class Options:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, name: str, value: str) -> None:
        self.entries[name] = value


class Session:
    """``w' = w + sum(x)`` in place, ``v' = v + 1`` from one buffer to the other; ``loss = w``.

    The first run with a number takes the step several times and keeps the addresses.
    """

    def __init__(self) -> None:
        self.recorded: dict[str, Binding] = {}
        self.runs = 0
        self.fails = False

    def run_with_iobinding(self, binding: Binding, options: Options) -> None:
        number = options.entries["gpu_graph_id"]
        if number not in self.recorded:
            self.recorded[number] = binding
            for _ in range(RUNS_TO_RECORD - 1):
                self._step(binding)
                if self.fails:
                    raise RuntimeError("CUDA error")
        self._step(self.recorded[number])

    def _step(self, binding: Binding) -> None:
        self.runs += 1
        w, x, v = (binding.inputs[name].memory for name in ("w", "x", "v"))
        binding.outputs["loss"].memory[...] = w
        binding.outputs["new.w"].memory[...] = w + x.sum()
        binding.outputs["new.v"].memory[...] = v + 1


class Setup:
    def __init__(self) -> None:
        self.session = Session()
        self.w, self.even, self.odd = Value(1.0), Value(10.0), Value(10.0)
        specs = [TensorSpec(name, "metric", "float64", ()) for name in ("loss", "new.w", "new.v")]
        spec = ProgramSpec("step", ("w", "v", "x"), tuple(specs), {"new.w": "w", "new.v": "v"})
        ort: Any = SimpleNamespace(RunOptions=Options, OrtValue=Value)
        values = OrtValues(ort, "cuda", 0)
        self.steps = RecordedSteps(ort, self.session, spec, values, self.binding)  # type: ignore[arg-type]
        self.side = 0

    def binding(self, side: int) -> Binding:
        binding = Binding()
        read, written = (self.even, self.odd) if side == 0 else (self.odd, self.even)
        binding.bind_ortvalue_input("w", self.w)
        binding.bind_ortvalue_output("new.w", self.w)
        binding.bind_ortvalue_input("v", read)
        binding.bind_ortvalue_output("new.v", written)
        return binding

    def step(self, x: Any) -> Any:
        result = self.steps.run(self.side, {"x": np.array(x)}, {}, [self.w])["loss"]
        self.side = 1 - self.side
        return result


def test_each_call_is_one_step() -> None:
    """Also the first of each side and of each shape, which ONNX Runtime takes several times."""
    setup = Setup()
    w, v = 1.0, 10.0
    for x in ([1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0], [8.0], [9.0, 1.0], [2.0]):
        result = setup.step(x)
        assert float(setup.steps.read(result)) == w
        w, v = w + sum(x), v + 1
        assert float(setup.w.memory) == w
        assert float((setup.even, setup.odd)[setup.side].memory) == v
    assert len(setup.session.recorded) == 4
    assert setup.session.runs == 7 + 4 * RUNS_TO_RECORD


def test_a_recording_that_fails_takes_no_step() -> None:
    """Neither then, nor in the next step, which is recorded under another number."""
    setup = Setup()
    setup.session.fails = True
    with pytest.raises(RuntimeError, match="CUDA error"):
        setup.step([2.0])
    assert float(setup.w.memory) == 1.0
    setup.session.fails = False
    for expected in (3.0, 5.0):
        setup.step([2.0])
        assert float(setup.w.memory) == expected
    assert list(setup.session.recorded) == ["1", "2", "3"]


def test_a_result_is_read_before_the_next_step() -> None:
    setup = Setup()
    first = setup.step([1.0])
    assert float(setup.steps.read(first)) == 1.0
    setup.step([1.0])
    with pytest.raises(SessionError, match="step 1 of this session was read after step 2"):
        setup.steps.read(first)


def test_another_thread_is_refused() -> None:
    setup = Setup()
    found: list[BaseException] = []

    def run() -> None:
        try:
            setup.step([1.0])
        except SessionError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "steps in the thread that loaded it" in str(found[0])
    assert setup.session.runs == 0
