"""What the engines that run with torch share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam_export._compat.precision import float32_precision
from sam_export.artifact.contract import HYPER, ProgramSpec
from sam_export.artifact.folder import Artifact
from sam_export.errors import RuntimeUnavailableError
from sam_export.runtime.batches import contiguous
from sam_export.runtime.cuda_options import CudaOptions, cuda_options
from sam_export.runtime.detect import parse_device
from sam_export.runtime.engine import LARGE_BLOCK

Program = Callable[[list[Tensor], list[Tensor], list[Tensor]], Sequence[Tensor]]
"""State, hyper-parameters and batch to the outputs that are not state; writes the state."""


class TorchEngine:
    """Device, threads, and the way from NumPy to torch and back.

    Args:
        artifact: What to run.
        device: ``cpu``, ``cuda`` or ``cuda:<index>``.
        threads: Threads of one operator, for the whole process; None leaves torch's setting.
        cuda: Of its fields those in `takes`; others are refused where they differ from the
            defaults: torch has settings of its own.

    Raises:
        RuntimeUnavailableError: CUDA was asked for and is not there.
        SessionError: ``cuda`` asks for something else.
    """

    takes: tuple[str, ...] = ()
    """Names of the fields of `CudaOptions` that the engine follows."""

    def __init__(
        self,
        artifact: Artifact,
        device: str,
        threads: int | None = None,
        cuda: CudaOptions | None = None,
    ) -> None:
        kind, index = parse_device(device)
        self._cuda = cuda_options(cuda, device, artifact.target, self.takes)
        count = torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 0
        if kind == "cuda" and index >= count:
            found = f"{count} CUDA device{'s' * (count > 1)}" if count else "no CUDA device"
            raise RuntimeUnavailableError(
                f"device={device!r} was asked for, but this torch ({torch.__version__}) finds "
                f"{found}. Install a CUDA build of torch, or use a device that is there, such as "
                "device='cpu'."
            )
        self._device = torch.device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        self._artifact = artifact
        # glibc hands freed memory back to the system, and takes it page by page again in the next
        # step, until a large block has been freed once. This one is never written to.
        torch.empty(LARGE_BLOCK, dtype=torch.uint8)

    @property
    def facts(self) -> dict[str, Any]:
        """Hashes of the graphs, torch's thread count and, on CUDA, what float32 may round to."""
        facts: dict[str, Any] = {
            "graphs": dict(self._artifact.digests),
            "threads": torch.get_num_threads(),
        }
        if self._device.type == "cuda":
            facts["float32"] = float32_precision()
            facts["cuda"] = self._cuda.to_dict()
        return facts

    def to_numpy(self, value: Any) -> NDArray[Any]:
        """A host copy of a tensor."""
        return np.array(value.detach().cpu().numpy())

    def _tensor(self, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            # An object of its own: Dynamo takes one that is given twice for one input for ever, and
            # marks what it compiles for.
            return value.detach().to(self._device).contiguous()
        array = contiguous(value)
        if any(stride < 0 or stride % array.itemsize for stride in array.strides):
            array = array.copy()  # contiguous in NumPy's eyes, since a size is 1; not in torch's
        # torch shares the array's memory and wants to be allowed to write to it; it never does.
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(self._device)


class Changes:
    """Which hyper-parameters have changed since they were last asked for.

    On a device, handing one over is a copy for which the host waits.
    """

    def __init__(self) -> None:
        self._last: dict[str, bytes] = {}

    def of(self, hyper: Mapping[str, NDArray[Any]]) -> list[tuple[str, NDArray[Any]]]:
        """Those that differ from the last call's, bit by bit, with their values."""
        changed = [
            (name, values)
            for name, values in hyper.items()
            if self._last.get(name) != values.tobytes()
        ]
        self._last.update((name, values.tobytes()) for name, values in changed)
        return changed


@dataclass(frozen=True)
class _Call:
    """What a program is run with, worked out once instead of at every run.

    Attributes:
        run: The program.
        state: The tensors that it reads and writes, in order.
        hyper: Those of the hyper-parameters, in order.
        results: Names of its outputs that are not state, in order.
    """

    run: Program
    state: list[Tensor]
    hyper: list[Tensor]
    results: tuple[str, ...]


class FlatTorchEngine(TorchEngine):
    """Holds the state as tensors, and runs programs over flat lists of them that write it in place.

    A subclass says how a program is made; that happens at its first run.
    """

    def __init__(
        self,
        artifact: Artifact,
        device: str,
        threads: int | None = None,
        cuda: CudaOptions | None = None,
    ) -> None:
        super().__init__(artifact, device, threads, cuda)
        self._state: dict[str, Tensor] = {}
        self._calls: dict[str, _Call] = {}
        self._hyper: dict[str, Tensor] = {}
        self._changed = Changes()

    def bind(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Copies the whole state to the device and makes it the current one."""
        for name, value in state.items():
            # Scalars are held as vectors of one element: see `tracing.in_place.scalar_positions`.
            tensor = torch.from_numpy(np.array(value, order="C")).reshape(value.shape or (1,))
            if name in self._state:
                self._state[name].copy_(tensor)
            else:
                self._state[name] = tensor.to(self._device)

    def run(
        self, program: str, batch: Sequence[Any], hyper: Mapping[str, NDArray[Any]]
    ) -> dict[str, Any]:
        """Runs one program on the current state; see `runtime.engine.Engine`."""
        for name, values in self._changed.of(hyper):
            if HYPER + name not in self._hyper:
                zeros = torch.zeros(len(values), dtype=torch.float64, device=self._device)
                self._hyper[HYPER + name] = zeros
            self._hyper[HYPER + name].copy_(torch.from_numpy(values))
        tensors = [self._tensor(value) for value in batch]
        self._before_run(program, tensors)
        call = self._calls.get(program)
        if call is None:
            call = self._calls[program] = self._call(self._artifact.contract.program(program))
        with torch.no_grad():
            results = call.run(call.state, call.hyper, tensors)
        return dict(zip(call.results, results, strict=True))

    def _call(self, spec: ProgramSpec) -> _Call:
        return _Call(
            run=self._program(spec),
            state=[self._state[name] for name in spec.inputs if name in self._state],
            hyper=[self._hyper[name] for name in spec.inputs if name in self._hyper],
            results=tuple(item.name for item in spec.outputs if item.name not in spec.feeds),
        )

    def current(self, names: Sequence[str]) -> dict[str, Any]:
        """The named state tensors where they are."""
        return {name: self._state[name].reshape(self._shapes[name]) for name in names}

    @functools.cached_property
    def _shapes(self) -> dict[str, Any]:
        return {spec.name: spec.shape for spec in self._artifact.contract.state}

    def read(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Copies of the named state tensors, on the host."""
        return {name: self.to_numpy(value) for name, value in self.current(names).items()}

    def _program(self, spec: ProgramSpec) -> Program:
        raise NotImplementedError

    def _before_run(self, program: str, batch: Sequence[Tensor]) -> None:
        """Sees the batch of every run first."""
