"""Engine for the target ``torch-compile``: a `torch.export` program under Inductor."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from sam_export._compat import inductor
from sam_export.artifact.contract import ProgramSpec, discarded_if_not_finite
from sam_export.errors import SessionError
from sam_export.runtime.torch_cuda_graph import RecordedProgram
from sam_export.runtime.torch_engine import FlatTorchEngine, Program
from sam_export.tracing.in_place import in_place, scalar_positions


class TorchCompileEngine(FlatTorchEngine):
    """Compiles each program at its first run, as a function that writes the state in place.

    With ``CudaOptions(cuda_graph=True)`` the step is then recorded, see `torch_cuda_graph`.
    """

    provider = "inductor"
    takes = ("cuda_graph",)

    def _program(self, spec: ProgramSpec) -> Program:
        graph = inductor.load_exported(self._artifact.file(spec.name), self._device)
        discarded = discarded_if_not_finite(spec, self._artifact.semantics)
        scalars = scalar_positions(self._artifact.contract, spec)
        drawn = self._artifact.details.get("random_ops")
        program = inductor.compiled(
            in_place(graph, spec, discarded, scalars),
            varying={index for index, _ in self._varying[spec.name]},
            eager_random=bool(drawn),
        )
        if not self._cuda.cuda_graph or not spec.feeds:
            return program
        if drawn:
            raise SessionError(
                f"The step draws from torch's own generator ({', '.join(drawn)}), which the runs "
                "before a recording move. Export it with Semantics(generator='philox'), or load "
                "it without CudaOptions(cuda_graph=True)."
            )
        return RecordedProgram(program, functools.partial(self._before_run, spec.name))

    def _before_run(self, program: str, batch: Sequence[Tensor]) -> None:
        for index, dim in self._varying[program]:
            if batch[index].shape[dim] > 1:
                inductor.mark_dynamic(batch[index], dim)

    @functools.cached_property
    def _varying(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Program to the dimensions of what it is given whose size is symbolic: tensor, number."""
        contract = self._artifact.contract
        return {
            program.name: tuple(
                (index, dim)
                for index, item in enumerate(contract.fed(program))
                for dim, size in enumerate(item.shape)
                if isinstance(size, str)
            )
            for program in contract.programs
        }
