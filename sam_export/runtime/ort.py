"""Engine for the ONNX targets: ONNX Runtime with I/O binding; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_export.artifact.contract import (
    HYPER,
    SEED,
    STEP,
    ProgramSpec,
    TensorSpec,
    discarded_if_not_finite,
)
from sam_export.artifact.folder import Artifact
from sam_export.runtime.cuda_options import CudaOptions, cuda_options
from sam_export.runtime.detect import require_onnxruntime, require_training_build
from sam_export.runtime.ort_cuda_graph import FixedResult, RecordedSteps
from sam_export.runtime.ort_session import OrtSessions
from sam_export.runtime.ort_values import OrtValues, symbols
from sam_export.runtime.random_inputs import RandomInputs


class OrtEngine:
    """Holds the state as ``OrtValue``s on the device and runs the programs on it.

    A state tensor that the artifact allows to be overwritten is bound as input and output at once.
    Any other one has two buffers that change places after every step.

    On a CUDA device, too, state, hyper-parameters and results stay on the device. What a step
    copies is the batch, if it comes from host memory, its random numbers, and hyper-parameters that
    have changed; that the graph itself copies nothing is checked when its session is made.

    Args:
        artifact: An ONNX artifact.
        device: ``cpu``, ``cuda`` or ``cuda:<index>``.
        threads: Threads of one operator; None leaves the choice to ONNX Runtime.
        cuda: Options for a CUDA device; None: the defaults.

    Raises:
        RuntimeUnavailableError: There is no ONNX Runtime, or it has not the provider that the
            device needs, or a step would leave the CUDA device. It never falls back to another
            one.
        ArtifactError: A graph does not match the contract.
        SessionError: Options for a CUDA device, and the device is another one.
    """

    def __init__(
        self,
        artifact: Artifact,
        device: str,
        threads: int | None = None,
        cuda: CudaOptions | None = None,
    ) -> None:
        self._ort = require_onnxruntime()
        names = ("memory_limit", "tf32", "cuda_graph", "allow_cpu_nodes")
        self._cuda = cuda_options(cuda, device, artifact.target, names)
        self._sessions = OrtSessions(self._ort, artifact, device, threads, self._cuda)
        self._values = OrtValues(self._ort, self._sessions.kind, self._sessions.index)
        self._artifact = artifact
        self._step = artifact.contract.program("step")
        discarded = discarded_if_not_finite(self._step, artifact.semantics)
        self._kept_back = {self._step.feeds[output] for output in discarded}
        self._overwritten = {
            name for name, reason in artifact.details.get("in_place", {}).items() if not reason
        }
        self._current: dict[str, Any] = {}
        self._spare: dict[str, Any] = {}
        self._sides: tuple[dict[str, Any], ...] = ()
        self._side = 0
        self._hyper: dict[str, tuple[NDArray[Any], Any]] = {}
        self._bindings: list[Any] = []
        self._recorded: RecordedSteps | None = None
        self._random = RandomInputs(artifact.details, threads)
        self._drawn_with: tuple[int, int] | None = None
        self.provider = self._sessions.provider
        self._session("step")

    # -- Engine -----------------------------------------------------------------------------------

    def bind(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Copies the whole state to the device and makes it the current one."""
        for name, value in state.items():
            if name in self._current:
                self._current[name].update_inplace(np.array(value, order="C"))
            else:
                self._current[name] = self._values.of(np.array(value, order="C"))
        if SEED in state:
            self._drawn_with = int(state[SEED]), int(state[STEP])
        if not self._sides:
            for hyper in self._artifact.contract.hyper:
                buffer = np.array(hyper.defaults, np.float64)
                # On the CPU ONNX Runtime reads this very memory at every step.
                self._hyper[HYPER + hyper.name] = buffer, self._values.of(buffer)
            swapped = [name for name in self._step.feeds.values() if name not in self._overwritten]
            self._spare = {name: self._values.of(np.array(state[name])) for name in swapped}
            self._sides = dict(self._current), {**self._current, **self._spare}
            if self._cuda.cuda_graph:
                self._recorded = RecordedSteps(
                    self._ort, self._session("step"), self._step, self._values, self._step_binding
                )
            else:
                self._bindings = [self._step_binding(0), self._step_binding(1)]

    def run(
        self, program: str, batch: Sequence[Any], hyper: Mapping[str, NDArray[Any]]
    ) -> dict[str, Any]:
        """Runs one program on the current state; see `runtime.engine.Engine`."""
        if program == "step":
            return self._run_step(batch, hyper)
        spec = self._artifact.contract.program(program)
        session = self._session(program)
        binding = session.io_binding()
        for name in spec.inputs:
            if name in self._current:
                binding.bind_ortvalue_input(name, self._current[name])
        return self._run(session, binding, spec, batch)

    def read(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Copies of the named state tensors, on the host."""
        return {name: np.array(self._current[name].numpy()) for name in names}

    @property
    def facts(self) -> dict[str, Any]:
        """Hashes of the graphs, and what the step's session says of its settings."""
        return {"graphs": dict(self._artifact.digests), **self._sessions.facts()}

    def to_numpy(self, value: Any) -> NDArray[Any]:
        """A host copy of something that `run` returned."""
        if isinstance(value, FixedResult):
            assert self._recorded is not None
            return self._recorded.read(value)
        return np.array(value.numpy())

    # -- the step ---------------------------------------------------------------------------------

    def _step_binding(self, side: int) -> Any:
        """A binding that reads one set of state buffers and writes the other one."""
        before, after = self._sides[side], self._sides[1 - side]
        binding = self._session("step").io_binding()
        for spec in self._artifact.contract.state:
            binding.bind_ortvalue_input(spec.name, before[spec.name])
        for output, name in self._step.feeds.items():
            binding.bind_ortvalue_output(output, after[name])
        for name, (_, value) in self._hyper.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def _set_hyper(self, hyper: Mapping[str, NDArray[Any]]) -> None:
        for name, values in hyper.items():
            buffer, value = self._hyper[HYPER + name]
            if not np.array_equal(buffer, values):
                np.copyto(buffer, values)
                if not self._values.share_memory:
                    value.update_inplace(buffer)

    def _run_step(self, batch: Sequence[Any], hyper: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        self._set_hyper(hyper)
        if self._recorded is None:
            binding = self._bindings[self._side]
            results = self._run(self._session("step"), binding, self._step, batch)
        else:
            results = self._run_recorded(self._recorded, batch)
        if self._spare:
            for name, spare in self._spare.items():
                self._current[name], self._spare[name] = spare, self._current[name]
            self._side = 1 - self._side
        if self._drawn_with is not None:
            self._drawn_with = self._next_draws(results["finite"])
        return results

    def _run_recorded(self, recorded: RecordedSteps, batch: Sequence[Any]) -> dict[str, Any]:
        names = self._fed(self._step)
        sizes = symbols(self._artifact.contract.batch, batch, names)
        inputs = {**dict(zip(names, batch, strict=True)), **self._drawn("step", sizes)}
        overwritten = [
            self._current[name] for name in self._step.feeds.values() if name in self._overwritten
        ]
        return dict(recorded.run(self._side, inputs, sizes, overwritten))

    def _next_draws(self, finite: Any) -> tuple[int, int]:
        """Seed and number of the next step, without asking the device where that can be."""
        assert self._drawn_with is not None
        seed, step = self._drawn_with
        unguarded = STEP not in self._kept_back
        return (seed, step + 1) if unguarded or bool(self.to_numpy(finite)) else (seed, step)

    def _run(
        self, session: Any, binding: Any, spec: ProgramSpec, batch: Sequence[Any]
    ) -> dict[str, Any]:
        names = self._fed(spec)
        sizes = symbols(self._artifact.contract.batch, batch, names)
        inputs = {**dict(zip(names, batch, strict=True)), **self._drawn(spec.name, sizes)}
        # Alive until the graph has run.
        held = [self._values.bind_batch(binding, name, value) for name, value in inputs.items()]
        results = {}
        for output in spec.outputs:
            if output.name not in spec.feeds:
                results[output.name] = self._values.room(output, sizes)
                binding.bind_ortvalue_output(output.name, results[output.name])
        session.run_with_iobinding(binding)
        del held
        return results

    def _fed(self, spec: ProgramSpec) -> list[str]:
        """Names of a program's batch inputs."""
        fed = {item.name for item in self._artifact.contract.batch}
        return [name for name in spec.inputs if name in fed]

    def _drawn(self, program: str, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """The random inputs of a program in this step."""
        if self._drawn_with is None:
            return {}
        return self._random.values(program, *self._drawn_with, sizes)

    def _session(self, program: str) -> Any:
        words = tuple(
            TensorSpec(item.name, "rng", item.dtype, item.size) for item in self._random.of(program)
        )
        return self._sessions.open(program, words)


class OrtTrainingEngine(OrtEngine):
    """`OrtEngine` for graphs with operators that only training builds of ONNX Runtime have.

    Raises:
        RuntimeUnavailableError: As `OrtEngine`, or the build is one for inference.
    """

    def __init__(
        self,
        artifact: Artifact,
        device: str,
        threads: int | None = None,
        cuda: CudaOptions | None = None,
    ) -> None:
        require_training_build()
        super().__init__(artifact, device, threads, cuda)
