"""Engine for the ONNX targets: ONNX Runtime with I/O binding; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_export.artifact.contract import (
    HYPER,
    PART,
    SEED,
    STEP,
    ProgramSpec,
    TensorSpec,
    discarded_if_not_finite,
)
from sam_export.artifact.folder import Artifact
from sam_export.artifact.philox import STEPS_PER_PART
from sam_export.errors import SessionError
from sam_export.runtime.cuda_options import CudaOptions, cuda_options
from sam_export.runtime.detect import require_onnxruntime, require_training_build
from sam_export.runtime.engine import LARGE_BLOCK
from sam_export.runtime.ort_call import OrtCall
from sam_export.runtime.ort_cuda_graph import FixedResult, RecordedSteps
from sam_export.runtime.ort_session import OrtSessions
from sam_export.runtime.ort_values import OrtValues
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
        # glibc hands freed memory back to the system, and takes it page by page again in the next
        # step, until a large block has been freed once. This one is never written to.
        np.empty(LARGE_BLOCK, np.uint8)
        names = ("memory_limit", "tf32", "cuda_graph", "allow_cpu_nodes")
        self._cuda = cuda_options(cuda, device, artifact.target, names)
        self._training = [spec for spec in artifact.contract.programs if spec.feeds]
        if self._cuda.cuda_graph and len(self._training) > 1:
            raise SessionError(
                "CudaOptions(cuda_graph=True) records one program, and this step has several that "
                f"train ({', '.join(spec.name for spec in self._training)}): it is periodic SAM, "
                "or staged. Load it without cuda_graph."
            )
        self._sessions = OrtSessions(self._ort, artifact, device, threads, self._cuda)
        self._values = OrtValues(self._ort, self._sessions.kind, self._sessions.index)
        self._artifact = artifact
        contract = artifact.contract
        self._calls = {spec.name: OrtCall(spec, contract.fed(spec)) for spec in contract.programs}
        self._kept_back = {
            spec.feeds[output]
            for spec in self._training
            for output in discarded_if_not_finite(spec, artifact.semantics)
        }
        self._overwritten = {
            name for name, reason in artifact.details.get("in_place", {}).items() if not reason
        }
        self._current: dict[str, Any] = {}
        self._spare: dict[str, Any] = {}
        # State that is not overwritten, by the programs that write it: its two buffers change
        # places together. 0 and 1 say which of them is the current one.
        self._swapped: dict[tuple[str, ...], list[str]] = {}
        self._side: dict[tuple[str, ...], int] = {}
        self._hyper: dict[str, tuple[NDArray[Any], Any]] = {}
        self._bindings: dict[Any, Any] = {}
        self._recorded: RecordedSteps | None = None
        self._random = RandomInputs(artifact.details, threads)
        self._drawn_with: tuple[int, int] | None = None
        self.provider = self._sessions.provider
        for spec in self._training:
            self._session(spec.name)

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
        if not self._hyper:
            for hyper in self._artifact.contract.hyper:
                buffer = np.array(hyper.defaults, np.float64)
                # On the CPU ONNX Runtime reads this very memory at every step.
                self._hyper[HYPER + hyper.name] = buffer, self._values.of(buffer)
            self._make_room(state)

    def _make_room(self, state: Mapping[str, NDArray[Any]]) -> None:
        """A second buffer for what is not overwritten."""
        written = {name for spec in self._training for name in spec.feeds.values()}
        for name in sorted(written - self._overwritten):
            writers = tuple(p.name for p in self._training if name in p.feeds.values())
            self._swapped.setdefault(writers, []).append(name)
            self._spare[name] = self._values.of(np.array(state[name]))
        self._side = dict.fromkeys(self._swapped, 0)
        if self._cuda.cuda_graph:
            step = self._training[0]
            self._recorded = RecordedSteps(
                self._ort, self._session(step.name), step, self._values,
                lambda _: self._binding(step),
            )  # fmt: skip

    def run(
        self, program: str, batch: Sequence[Any], hyper: Mapping[str, NDArray[Any]]
    ) -> dict[str, Any]:
        """Runs one program on the current state; see `runtime.engine.Engine`."""
        spec = self._artifact.contract.program(program)
        self._set_hyper(hyper)
        side = (program, *self._side.values())
        if self._recorded is not None and spec.feeds:
            results = self._run_recorded(self._recorded, spec, side, batch)
        else:
            if side not in self._bindings:
                self._bindings[side] = self._binding(spec)
            results = self._run(spec, self._bindings[side], batch)
        if spec.feeds:
            self._stepped(spec, results)
        return results

    def current(self, names: Sequence[str]) -> dict[str, Any]:
        """The named state tensors where they are."""
        return {name: self._current[name] for name in names}

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

    # -- running ----------------------------------------------------------------------------------

    def _binding(self, spec: ProgramSpec) -> Any:
        """A new binding that reads the current state, and writes over it or into the spare."""
        binding = self._session(spec.name).io_binding()
        for name in spec.inputs:
            if name in self._current:
                binding.bind_ortvalue_input(name, self._current[name])
            elif name in self._hyper:
                binding.bind_ortvalue_input(name, self._hyper[name][1])
        for output, name in spec.feeds.items():
            binding.bind_ortvalue_output(output, self._spare.get(name, self._current[name]))
        return binding

    def _set_hyper(self, hyper: Mapping[str, NDArray[Any]]) -> None:
        for name, values in hyper.items():
            buffer, value = self._hyper[HYPER + name]
            if not np.array_equal(buffer, values):
                np.copyto(buffer, values)
                if not self._values.share_memory:
                    value.update_inplace(buffer)

    def _stepped(self, spec: ProgramSpec, results: Mapping[str, Any]) -> None:
        """Makes the new state of a program that trains the current one."""
        for writers, names in self._swapped.items():
            if spec.name in writers:
                for name in names:
                    spare = self._spare[name]
                    self._current[name], self._spare[name] = spare, self._current[name]
                self._side[writers] = 1 - self._side[writers]
        if self._drawn_with is not None:
            self._drawn_with = self._next_draws(results["finite"])

    def _run_recorded(
        self, recorded: RecordedSteps, spec: ProgramSpec, side: Any, batch: Sequence[Any]
    ) -> dict[str, Any]:
        inputs, sizes = self._inputs(spec, batch)
        overwritten = [
            self._current[name] for name in spec.feeds.values() if name in self._overwritten
        ]
        return dict(recorded.run(side, inputs, sizes, overwritten))

    def _next_draws(self, finite: Any) -> tuple[int, int]:
        """Seed and number of the next step, without asking the device where that can be."""
        assert self._drawn_with is not None
        seed, step = self._drawn_with
        unguarded = STEP not in self._kept_back
        return (seed, step + 1) if unguarded or bool(self.to_numpy(finite)) else (seed, step)

    def _run(self, spec: ProgramSpec, binding: Any, batch: Sequence[Any]) -> dict[str, Any]:
        inputs, sizes = self._inputs(spec, batch)
        # Alive until the graph has run.
        held = self._values.bind_inputs(binding, inputs)
        results = self._calls[spec.name].bind_results(binding, self._values, sizes)
        self._session(spec.name).run_with_iobinding(binding)
        del held
        return results

    def _inputs(
        self, spec: ProgramSpec, batch: Sequence[Any]
    ) -> tuple[dict[str, Any], dict[str, int]]:
        """What a program is fed in this step, random numbers too; and its symbolic sizes."""
        call = self._calls[spec.name]
        inputs = dict(zip(call.fed, batch, strict=True))
        sizes = call.sizes(batch)
        if self._drawn_with is not None:
            seed, step = self._drawn_with
            step += int(inputs.get(PART, 0)) * STEPS_PER_PART
            inputs |= self._random.values(spec.name, seed, step, sizes)
        return inputs, sizes

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
