"""Engine for the target ``torch-compile``: a `torch.export` program under Inductor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

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
            in_place(graph, spec, discarded, scalars), varying="batch", eager_random=bool(drawn)
        )
        if not self._cuda.cuda_graph or not spec.feeds:
            return program
        if drawn:
            raise SessionError(
                f"The step draws from torch's own generator ({', '.join(drawn)}), which the runs "
                "before a recording move. Export it with Semantics(generator='philox'), or load "
                "it without CudaOptions(cuda_graph=True)."
            )
        return RecordedProgram(program, partial(self._before_run, spec))

    def _before_run(self, spec: ProgramSpec, batch: Sequence[Tensor]) -> None:
        for item, tensor in zip(self._artifact.contract.fed(spec), batch, strict=True):
            for dim, size in enumerate(item.shape):
                if isinstance(size, str) and tensor.shape[dim] > 1:
                    inductor.mark_dynamic(tensor, dim)
