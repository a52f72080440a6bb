"""Engine for the ONNX targets: ONNX Runtime with I/O binding; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from sam_export.errors import ArtifactError, RuntimeUnavailableError, SamExportError
from sam_export.runtime.batches import contiguous
from sam_export.runtime.detect import (
    parse_device,
    require_onnxruntime,
    require_provider,
    require_training_build,
)
from sam_export.runtime.random_inputs import RandomInputs

_TYPES = {
    "float16": "tensor(float16)",
    "float32": "tensor(float)",
    "float64": "tensor(double)",
    "int8": "tensor(int8)",
    "int16": "tensor(int16)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
    "uint8": "tensor(uint8)",
    "bool": "tensor(bool)",
}

_NO_KERNEL = re.compile(
    r"Could not find an implementation for (?P<op>\w+)\((?P<since>\d+)\) node with name "
    r"'(?P<node>[^']*)'"
)

FLOAT32_FUSIONS = ("MatmulTransposeFusion", "MatMulScaleFusion", "QuickGeluFusion")
"""Optimizers of ONNX Runtime that fuse float64 nodes into operators that are right in float32 only.

The first one takes MatMul and Transpose, into an operator that 1.19.2 does not have in float64; the
second one a scalar factor, which becomes a float32 number in 1.31.1; the third ``x * sigmoid(x)``.
"""


class OrtEngine:
    """Holds the state as ``OrtValue``s on the device and runs the programs on it.

    A state tensor that the artifact allows to be overwritten is bound as input and output at once.
    Any other one has two buffers that change places after every step.

    Args:
        artifact: An ONNX artifact.
        device: ``cpu``, ``cuda`` or ``cuda:<index>``.
        threads: Threads of one operator; None leaves the choice to ONNX Runtime.

    Raises:
        RuntimeUnavailableError: There is no ONNX Runtime, or it has not the provider that the
            device needs. It never falls back to another one.
        ArtifactError: A graph does not match the contract.
    """

    def __init__(self, artifact: Artifact, device: str, threads: int | None = None) -> None:
        self._ort = require_onnxruntime()
        self._providers = require_provider(device)
        self._kind, self._index = parse_device(device)
        self._artifact = artifact
        self._threads = threads
        self._sessions: dict[str, Any] = {}
        self._step = artifact.contract.program("step")
        discarded = discarded_if_not_finite(self._step, artifact.semantics)
        self._kept_back = {self._step.feeds[output] for output in discarded}
        self._overwritten = {
            name for name, reason in artifact.details.get("in_place", {}).items() if not reason
        }
        self._current: dict[str, Any] = {}
        self._spare: dict[str, Any] = {}
        self._hyper: dict[str, Any] = {}
        self._bindings: list[Any] = []
        self._random = RandomInputs(artifact.details, threads)
        self._drawn_with: tuple[int, int] | None = None
        self.provider = self._providers[0]
        self._session("step")

    # -- Engine -----------------------------------------------------------------------------------

    def bind(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Copies the whole state to the device and makes it the current one."""
        for name, value in state.items():
            if name in self._current:
                self._current[name].update_inplace(np.array(value, order="C"))
            else:
                self._current[name] = self._on_device(np.array(value, order="C"))
        if SEED in state:
            self._drawn_with = int(state[SEED]), int(state[STEP])
        if not self._bindings:
            swapped = [name for name in self._step.feeds.values() if name not in self._overwritten]
            self._spare = {name: self._on_device(np.array(state[name])) for name in swapped}
            self._bindings = [
                self._step_binding(self._current, {**self._current, **self._spare}),
                self._step_binding({**self._current, **self._spare}, self._current),
            ]

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
        session = self._session("step")
        options = session.get_session_options()
        return {
            "graphs": dict(self._artifact.digests),
            "providers": session.get_providers(),
            "provider_options": {
                name: dict(values) for name, values in session.get_provider_options().items()
            },
            "graph_optimization_level": options.graph_optimization_level.name,
            "disabled_optimizers": self._disabled_optimizers(),
            "intra_op_num_threads": options.intra_op_num_threads,
            "inter_op_num_threads": options.inter_op_num_threads,
            "execution_mode": options.execution_mode.name,
        }

    def to_numpy(self, value: Any) -> NDArray[Any]:
        """A host copy of an ``OrtValue``."""
        return np.array(value.numpy())

    # -- the step ---------------------------------------------------------------------------------

    def _step_binding(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> Any:
        binding = self._session("step").io_binding()
        for spec in self._artifact.contract.state:
            binding.bind_ortvalue_input(spec.name, before[spec.name])
        for output, name in self._step.feeds.items():
            binding.bind_ortvalue_output(output, after[name])
        for hyper in self._artifact.contract.hyper:
            name = HYPER + hyper.name
            if name not in self._hyper:
                buffer = np.array(hyper.defaults, np.float64)
                # ONNX Runtime reads this memory at every step; the array must stay alive.
                self._hyper[name] = (buffer, self._ort.OrtValue.ortvalue_from_numpy(buffer))
            binding.bind_ortvalue_input(name, self._hyper[name][1])
        return binding

    def _run_step(self, batch: Sequence[Any], hyper: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        for name, values in hyper.items():
            np.copyto(self._hyper[HYPER + name][0], values)
        results = self._run(self._session("step"), self._bindings[0], self._step, batch)
        if self._spare:
            for name, spare in self._spare.items():
                self._current[name], self._spare[name] = spare, self._current[name]
            self._bindings.reverse()
        if self._drawn_with is not None:
            self._drawn_with = self._next_draws(results["finite"])
        return results

    def _next_draws(self, finite: Any) -> tuple[int, int]:
        """Seed and number of the next step, without asking the device where that can be."""
        assert self._drawn_with is not None
        seed, step = self._drawn_with
        unguarded = STEP not in self._kept_back
        return (seed, step + 1) if unguarded or bool(self.to_numpy(finite)) else (seed, step)

    def _run(
        self, session: Any, binding: Any, spec: ProgramSpec, batch: Sequence[Any]
    ) -> dict[str, Any]:
        fed = {item.name for item in self._artifact.contract.batch}
        names = [name for name in spec.inputs if name in fed]
        held = [self._on_device(contiguous(value)) for value in batch]
        for name, value in zip(names, held, strict=True):
            binding.bind_ortvalue_input(name, value)
        sizes = _symbols(self._artifact.contract.batch, held, names)
        for name, value in self._random_values(spec.name, sizes):
            held.append(value)  # alive until the graph has run
            binding.bind_ortvalue_input(name, value)
        results = {}
        for output in spec.outputs:
            if output.name not in spec.feeds:
                results[output.name] = self._room(output, sizes)
                binding.bind_ortvalue_output(output.name, results[output.name])
        session.run_with_iobinding(binding)
        return results

    def _random_values(self, program: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, Any]]:
        if self._drawn_with is not None:
            for name, value in self._random.values(program, *self._drawn_with, sizes).items():
                yield name, self._on_device(value)

    def _room(self, spec: TensorSpec, sizes: Mapping[str, int]) -> Any:
        """A new buffer for one result.

        What a binding allocates itself it hands out by reference, and replaces at the next run:
        a result of an earlier step would change under its reader.
        """
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        return self._ort.OrtValue.ortvalue_from_shape_and_type(
            shape, np.dtype(spec.dtype).type, self._kind, self._index
        )

    # -- sessions ---------------------------------------------------------------------------------

    def _session(self, program: str) -> Any:
        if program not in self._sessions:
            options = self._ort.SessionOptions()
            options.log_severity_level = 3
            # Threads that spin between steps slow down everything else on the machine.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            if self._threads is not None:
                options.intra_op_num_threads = self._threads
            path = str(self._artifact.file(program))
            try:
                session = self._ort.InferenceSession(
                    path,
                    options,
                    providers=self._provider_options(),
                    disabled_optimizers=self._disabled_optimizers(),
                )
            except Exception as error:  # onnxruntime's own, which derive from nothing narrower
                raise self._refused(program, error) from error
            session.disable_fallback()
            if session.get_providers()[0] != self.provider:
                raise RuntimeUnavailableError(
                    f"ONNX Runtime would run {program!r} on {session.get_providers()[0]} instead "
                    f"of {self.provider}; it could not start that provider. `sam-export targets` "
                    "says what is missing."
                )
            self._check(program, session)
            self._sessions[program] = session
        return self._sessions[program]

    def _refused(self, program: str, error: Exception) -> SamExportError:
        """Why ONNX Runtime does not take a graph: it lacks a kernel, or the file is not right."""
        missing = _NO_KERNEL.search(str(error))
        if missing is None:
            return ArtifactError(
                f"ONNX Runtime {self._ort.__version__} cannot load program {program!r} from "
                f"{self._artifact.file(program)}: {error}"
            )
        used = {spec.dtype for spec in self._artifact.contract.state}
        dtypes = ", ".join(sorted(dtype for dtype in used if dtype.startswith("float")))
        return RuntimeUnavailableError(
            f"ONNX Runtime {self._ort.__version__} has no {self.provider} kernel for the node "
            f"{missing['node']!r} of program {program!r}, {missing['op']} (since opset "
            f"{missing['since']}), in the dtype that it has there; the state is {dtypes}. Export "
            "the model in float32, or use another target."
        )

    def _disabled_optimizers(self) -> list[str]:
        double = any(spec.dtype == "float64" for spec in self._artifact.contract.state)
        return list(FLOAT32_FUSIONS) if double else []

    def _provider_options(self) -> list[Any]:
        if self._kind == "cpu":
            return list(self._providers)
        options = {"device_id": str(self._index), "use_tf32": "0"}
        return [(self.provider, options), *self._providers[1:]]

    def _check(self, program: str, session: Any) -> None:
        contract = self._artifact.contract
        spec = contract.program(program)
        words = [
            TensorSpec(item.name, "rng", item.dtype, item.size) for item in self._random.of(program)
        ]
        for kind, found, expected in (
            ("input", session.get_inputs(), [*contract.inputs_of(spec), *words]),
            ("output", session.get_outputs(), spec.outputs),
        ):
            names = [item.name for item in found]
            if names != [item.name for item in expected]:
                different = sorted(set(names) ^ {item.name for item in expected}) or names
                raise ArtifactError(
                    f"The {kind}s of {self._artifact.file(program)} are not those of the contract: "
                    f"{', '.join(different[:5])}. Export the step again."
                )
            for item, wanted in zip(found, expected, strict=True):
                _check_tensor(program, kind, item, wanted)

    def _on_device(self, value: NDArray[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(value, self._kind, self._index)


class OrtTrainingEngine(OrtEngine):
    """`OrtEngine` for graphs with operators that only training builds of ONNX Runtime have.

    Raises:
        RuntimeUnavailableError: As `OrtEngine`, or the build is one for inference.
    """

    def __init__(self, artifact: Artifact, device: str, threads: int | None = None) -> None:
        require_training_build()
        super().__init__(artifact, device, threads)


def _symbols(
    specs: Iterable[TensorSpec], held: Sequence[Any], names: Sequence[str]
) -> dict[str, int]:
    """Symbolic size to its value in this batch."""
    shapes = {name: value.shape() for name, value in zip(names, held, strict=True)}
    return {
        size: shapes[spec.name][d]
        for spec in specs
        if spec.name in shapes
        for d, size in enumerate(spec.shape)
        if isinstance(size, str)
    }


def _check_tensor(program: str, kind: str, found: Any, wanted: TensorSpec) -> None:
    same_shape = len(found.shape) == len(wanted.shape) and all(
        a == b or isinstance(b, str) for a, b in zip(found.shape, wanted.shape, strict=True)
    )
    if found.type != _TYPES[wanted.dtype] or not same_shape:
        raise ArtifactError(
            f"The {kind} {wanted.name!r} of program {program!r} is {found.type}{found.shape}; the "
            f"contract says {wanted.description}. Export the step again."
        )
