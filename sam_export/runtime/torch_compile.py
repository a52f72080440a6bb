"""Engine for the target ``torch-compile``: a `torch.export` program under Inductor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam_export._compat import inductor
from sam_export.artifact.contract import HYPER, ProgramSpec
from sam_export.artifact.folder import Artifact
from sam_export.errors import RuntimeUnavailableError


class TorchCompileEngine:
    """Holds the state as tensors and runs compiled programs that write it in place.

    The step ends by copying the new state over the old one, which Inductor folds into the update:
    less memory than eager SAM takes, and leaving the state alone when a value is not finite costs
    nothing. Each program is compiled at its first run.

    Args:
        artifact: An artifact of this target.
        device: ``cpu``, ``cuda`` or ``cuda:<index>``.
        threads: Threads of one operator, for the whole process; None leaves torch's setting.

    Raises:
        RuntimeUnavailableError: CUDA was asked for and is not there.
    """

    provider = "inductor"

    def __init__(self, artifact: Artifact, device: str, threads: int | None = None) -> None:
        self._device = torch.device(device)
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeUnavailableError(
                f"device={device!r} was asked for, but this torch ({torch.__version__}) finds no "
                "CUDA device. Install a CUDA build of torch, or use device='cpu'."
            )
        if threads is not None:
            torch.set_num_threads(threads)
        self._artifact = artifact
        self._state: dict[str, Tensor] = {}
        self._programs: dict[str, Callable[..., list[Tensor]]] = {}
        self._hyper: dict[str, Tensor] = {}

    # -- Engine -----------------------------------------------------------------------------------

    def bind(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Copies the whole state to the device and makes it the current one."""
        for name, value in state.items():
            # torch 2.13 compiles `scalar.copy_(new)` into nothing where `scalar` is a float64
            # input of no dimension; so scalars are held as vectors of one element.
            tensor = torch.from_numpy(np.array(value, order="C")).reshape(value.shape or (1,))
            if name in self._state:
                self._state[name].copy_(tensor)
            else:
                self._state[name] = tensor.to(self._device)

    def run(
        self, program: str, batch: Sequence[Any], hyper: Mapping[str, NDArray[Any]]
    ) -> dict[str, Any]:
        """Runs one program on the current state; see `runtime.engine.Engine`."""
        spec = self._artifact.contract.program(program)
        state = [self._state[name] for name in spec.inputs if name in self._state]
        for name, values in hyper.items():
            if HYPER + name not in self._hyper:
                self._hyper[HYPER + name] = torch.zeros(len(values), dtype=torch.float64)
            self._hyper[HYPER + name].copy_(torch.from_numpy(values))
        hypers = [self._hyper[name].to(self._device) for name in spec.inputs if name in self._hyper]
        tensors = [self._tensor(value) for value in batch]
        self._mark(spec, tensors)
        with torch.no_grad():
            results = self._program(spec)(state, hypers, tensors)
        names = [output.name for output in spec.outputs if output.name not in spec.feeds]
        return dict(zip(names, results, strict=True))

    def read(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Copies of the named state tensors, on the host."""
        shapes = {spec.name: spec.shape for spec in self._artifact.contract.state}
        return {
            name: np.array(self._state[name].cpu().numpy()).reshape(shapes[name])  # type: ignore[arg-type]
            for name in names
        }

    def to_numpy(self, value: Any) -> NDArray[Any]:
        """A host copy of a tensor."""
        return np.array(value.detach().cpu().numpy())

    # -- programs ---------------------------------------------------------------------------------

    def _program(self, spec: ProgramSpec) -> Callable[..., list[Tensor]]:
        if spec.name not in self._programs:
            graph = inductor.load_exported(self._artifact.file(spec.name), self._device)
            guarded = self._artifact.semantics.on_nonfinite != "ignore"
            self._programs[spec.name] = inductor.compiled(
                in_place(graph, spec, guarded, self._scalars(spec)),
                varying="batch",
                eager_random=bool(self._artifact.details.get("random_ops")),
            )
        return self._programs[spec.name]

    def _scalars(self, spec: ProgramSpec) -> set[int]:
        """Positions of the state inputs that have no dimension."""
        shapes = {item.name: item.shape for item in self._artifact.contract.state}
        return {index for index, name in enumerate(spec.inputs) if shapes.get(name) == ()}

    def _tensor(self, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(self._device)
        array = np.ascontiguousarray(value)
        # torch shares the array's memory and wants to be allowed to write to it; it never does.
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(self._device)

    def _mark(self, spec: ProgramSpec, tensors: Sequence[Tensor]) -> None:
        fed = {item.name: item for item in self._artifact.contract.batch}
        names = [name for name in spec.inputs if name in fed]
        for name, tensor in zip(names, tensors, strict=True):
            for dim, size in enumerate(fed[name].shape):
                if isinstance(size, str) and tensor.shape[dim] > 1:
                    inductor.mark_dynamic(tensor, dim)


def in_place(
    graph: Callable[..., Sequence[Tensor]], spec: ProgramSpec, guarded: bool, scalars: set[int]
) -> Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor]]:
    """``graph`` with its new state written over the old one; returns the other outputs.

    Args:
        graph: Flat tensors to flat tensors, without side effects.
        spec: Order of the inputs and outputs, and which output feeds which input.
        guarded: Keep the old state when the output ``finite`` is false.
        scalars: Positions of the state tensors that are held as vectors of one element.
    """
    outputs = [output.name for output in spec.outputs]
    reported = [index for index, name in enumerate(outputs) if name not in spec.feeds]
    written = [
        (index, spec.inputs.index(spec.feeds[name]))
        for index, name in enumerate(outputs)
        if name in spec.feeds
    ]
    finite = outputs.index("finite") if guarded and written else None

    def run(state: list[Tensor], hyper: list[Tensor], batch: list[Tensor]) -> list[Tensor]:
        given = [value[0] if i in scalars else value for i, value in enumerate(state)]
        results = graph(*given, *hyper, *batch)
        for index, position in written:
            new, old = results[index].reshape(state[position].shape), state[position]
            old.copy_(new if finite is None else torch.where(results[finite], new, old))
        return [results[index] for index in reported]

    return run
