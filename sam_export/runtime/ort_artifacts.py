"""Engine for the target ``ort-artifacts``: the stock ``Module``, ``Optimizer`` and checkpoint.

It calls them as any training program does; nothing of the step is computed here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_export.artifact.contract import HYPER
from sam_export.artifact.folder import Artifact
from sam_export.artifact.ort_checkpoint import OrtCheckpoint
from sam_export.artifact.ort_layout import OrtLayout
from sam_export.errors import ArtifactError, SamExportError
from sam_export.runtime.batches import contiguous
from sam_export.runtime.cuda_options import CudaOptions, cuda_options
from sam_export.runtime.detect import parse_device, require_provider, require_training_build
from sam_export.runtime.ort_training_api import training_api, value_of
from sam_export.runtime.placement import recorded, refuse_copies, summary

OPTIMIZER_MODEL = "optimizer_model.onnx"


class OrtArtifactsEngine:
    """A module and an optimizer of onnxruntime-training over one checkpoint.

    The stock API takes the number of a CUDA device and no other provider option. TF32 is kept out
    by ``NVIDIA_TF32_OVERRIDE=0`` in the environment of the process, which cuBLAS and cuDNN read;
    it holds for the whole process, and a value that is there already stays.

    Args:
        artifact: An artifact of target ``ort-artifacts``.
        device: ``cpu``, ``cuda`` or ``cuda:<index>``.
        threads: Threads of one operator; None leaves the choice to ONNX Runtime.
        cuda: Options for a CUDA device, of which ``tf32`` and ``allow_cpu_nodes``.

    Raises:
        RuntimeUnavailableError: No training build, or it has not the provider for the device, or
            a step would leave the CUDA device.
        SessionError: Other options, or options for another device.
        ArtifactError: A graph does not match the contract, or cannot be loaded.
    """

    def __init__(
        self,
        artifact: Artifact,
        device: str,
        threads: int | None = None,
        cuda: CudaOptions | None = None,
    ) -> None:
        self._cuda = cuda_options(cuda, device, artifact.target, ("tf32", "allow_cpu_nodes"))
        self._ort = require_training_build()
        self._api = training_api()
        self.provider = require_provider(device)[0]
        self._kind, self._index = parse_device(device)
        if self._kind == "cuda" and not self._cuda.tf32:
            os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        self._placed: dict[str, Any] = {}
        self._artifact = artifact
        self._layout = OrtLayout.from_dict(artifact.details.get("layout", {}))
        self._options = self._ort.SessionOptions()
        self._options.log_severity_level = 3
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            self._options.intra_op_num_threads = threads
        self._state: Any = None
        self._module: Any = None
        self._optimizer: Any = None
        self._names: list[str] = []
        self._sessions: dict[str, Any] = {}
        self._hyper: dict[str, tuple[float, ...]] = {
            item.name: tuple(item.defaults) for item in artifact.contract.hyper
        }

    # -- Engine -----------------------------------------------------------------------------------

    @property
    def facts(self) -> dict[str, Any]:
        """Hashes of the graphs, and the settings that the module's sessions were given."""
        facts = {
            "graphs": dict(self._artifact.digests),
            "graph_optimization_level": self._options.graph_optimization_level.name,
            "intra_op_num_threads": self._options.intra_op_num_threads,
            "inter_op_num_threads": self._options.inter_op_num_threads,
            "execution_mode": self._options.execution_mode.name,
        }
        if self._kind == "cuda":
            facts["cuda"] = self._cuda.to_dict()
            facts["NVIDIA_TF32_OVERRIDE"] = os.environ.get("NVIDIA_TF32_OVERRIDE")
            facts["placement"] = dict(self._placed)
        return facts

    def bind(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Makes a checkpoint of the whole state, and a module and an optimizer over it.

        Where they are there already, and the optimizer holds no state, new values are copied in.
        """
        if self._module is not None and not self._layout.holds_slots:
            written = set(self._layout.written)
            for name, value in state.items():
                stored = value.astype(np.float32) if name in written else value
                self._state.parameters[name] = np.array(stored, order="C")
            return
        checkpoint = self._layout.checkpoint(self._artifact.contract, state, self._hyper)
        with tempfile.TemporaryDirectory(prefix="sam_export-") as folder:
            path = Path(folder, "checkpoint")
            path.write_bytes(checkpoint.to_bytes())
            self._state = self._api.CheckpointState.load_checkpoint(path)
        self._sessions.clear()
        device = self._kind if self._kind == "cpu" else f"{self._kind}:{self._index}"
        step = self._artifact.file("step")
        optimizer = self._artifact.path / OPTIMIZER_MODEL
        try:
            # Without the evaluation model: `_evaluated` opens it once it is asked for.
            self._module = self._placing(
                "step", lambda: self._api.Module(step, self._state, None, device, self._options)
            )
            self._optimizer = self._placing(
                "optimizer", lambda: self._api.Optimizer(optimizer, self._module)
            )
        except SamExportError:
            raise
        except Exception as error:  # onnxruntime's own, which derive from nothing narrower
            raise ArtifactError(
                f"onnxruntime-training {self._ort.__version__} cannot load {step.parent}: {error}"
            ) from error
        self._check()
        self._optimizer.set_learning_rate(self._hyper["lr"][0])

    def run(
        self, program: str, batch: Sequence[Any], hyper: Mapping[str, NDArray[Any]]
    ) -> dict[str, Any]:
        """Runs one program on the current state; see `runtime.engine.Engine`."""
        if program != "step":
            return self._evaluated(program, batch)
        self._use(hyper)
        results = self._module(*(self._on_device(value) for value in batch))
        self._optimizer.step()
        self._module.lazy_reset_grad()
        return dict(zip(self._names, results, strict=True))

    def current(self, names: Sequence[str]) -> dict[str, Any]:
        """The named state tensors; a step in stages, which asks for them, has no such artifact."""
        return dict(self.read(names))

    def read(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Copies of the named state tensors, on the host."""
        specs = {item.name: item for item in self._artifact.contract.state}
        slots: dict[str, NDArray[Any]] = {}
        if self._layout.holds_slots and any(specs[name].role == "slot" for name in names):
            slots = self._layout.slots(self._artifact.contract, self._saved().optimizer)
        return {
            name: slots[name]
            if name in slots
            else np.array(self._state.parameters[name].data).astype(specs[name].dtype)
            for name in names
        }

    def to_numpy(self, value: Any) -> NDArray[Any]:
        """A host copy of an ``OrtValue``."""
        return np.array(value.numpy())

    # ---------------------------------------------------------------------------------------------

    def _placing(self, graph: str, make: Callable[[], Any]) -> Any:
        """What ``make`` makes; on a CUDA device after asking where its nodes run.

        The stock optimizer reads in host memory whether it is to update, once at the end of a step,
        so only the step itself is refused for what it copies.
        """
        if self._kind == "cpu":
            return make()
        made, placed = recorded(self._options, make)
        self._placed[graph] = summary(placed, results_on_device=False)
        if graph == "step" and not self._cuda.allow_cpu_nodes:
            built_for = str(self._artifact.details.get("device", "cpu"))
            runtime = f"onnxruntime-training {self._ort.__version__}"
            refuse_copies(placed, graph, runtime, built_for, results_on_device=False)
        return made

    def _use(self, hyper: Mapping[str, NDArray[Any]]) -> None:
        """Hands over the hyper-parameters that have changed."""
        for name, values in hyper.items():
            numbers = tuple(map(float, values))
            if numbers == self._hyper[name]:
                continue
            if HYPER + name in self._layout.frozen:
                self._state.parameters[HYPER + name] = np.array(numbers, np.float64)
            else:
                self._optimizer.set_learning_rate(numbers[0])
            self._hyper[name] = numbers

    def _saved(self) -> OrtCheckpoint:
        """What the stock API would save now; the only way to the moments of its optimizer."""
        with tempfile.TemporaryDirectory(prefix="sam_export-") as folder:
            path = Path(folder, "checkpoint")
            self._api.CheckpointState.save_checkpoint(self._state, path, True)
            return OrtCheckpoint.from_bytes(path.read_bytes())

    def _evaluated(self, program: str, batch: Sequence[Any]) -> dict[str, Any]:
        """Runs a program that changes nothing, on the parameters where they are.

        The stock API would run the evaluation model only as a whole, with targets.
        """
        if program not in self._sessions:
            self._sessions[program] = self._ort.InferenceSession(
                str(self._artifact.file(program)),
                self._options,
                providers=self._provider_options(),
            )
        session = self._sessions[program]
        spec = self._artifact.contract.program(program)
        fed = [item.name for item in self._artifact.contract.batch if item.name in spec.inputs]
        given = {name: self._on_device(value) for name, value in zip(fed, batch, strict=True)}
        inputs = {
            item.name: given[item.name]
            if item.name in given
            else value_of(self._state.parameters[item.name], self._ort)
            for item in session.get_inputs()
        }
        names = [output.name for output in spec.outputs]
        return dict(zip(names, session.run_with_ort_values(names, inputs), strict=True))

    def _provider_options(self) -> list[Any]:
        names = require_provider(self._device_name)
        if self._kind == "cpu":
            return list(names)
        return [(names[0], self._cuda.provider_options(self._index)), *names[1:]]

    @property
    def _device_name(self) -> str:
        return self._kind if self._kind == "cpu" else f"{self._kind}:{self._index}"

    def _on_device(self, value: Any) -> Any:
        if isinstance(value, self._ort.OrtValue):
            return value
        return self._ort.OrtValue.ortvalue_from_numpy(contiguous(value), self._kind, self._index)

    def _check(self) -> None:
        contract = self._artifact.contract
        spec = contract.program("step")
        self._names = self._module.output_names()
        for kind, found, wanted in (
            ("inputs", self._module.input_names(), [item.name for item in contract.batch]),
            ("outputs", self._names, [o.name for o in spec.outputs if o.name not in spec.feeds]),
        ):
            if list(found) != wanted:
                raise ArtifactError(
                    f"The {kind} of {self._artifact.file('step')} are {', '.join(found)}; the "
                    f"contract says {', '.join(wanted)}. Export the step again."
                )
