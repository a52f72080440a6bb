"""Engine for the target ``aot-inductor``: compiled packages that write the state in place."""

from __future__ import annotations

import torch
from torch import Tensor

from sam_export._compat import aot_inductor
from sam_export.artifact.contract import ProgramSpec
from sam_export.artifact.folder import Artifact
from sam_export.artifact.machine import obstacles, this_machine
from sam_export.errors import ArtifactError, RuntimeUnavailableError
from sam_export.runtime.cuda_options import CudaOptions
from sam_export.runtime.torch_engine import FlatTorchEngine, Program


class AotInductorEngine(FlatTorchEngine):
    """Runs compiled code; nothing is compiled here, and Inductor is not even imported.

    Raises:
        RuntimeUnavailableError: The artifact was built for another machine, device or torch.
    """

    provider = "aot-inductor"

    def __init__(
        self,
        artifact: Artifact,
        device: str,
        threads: int | None = None,
        cuda: CudaOptions | None = None,
    ) -> None:
        super().__init__(artifact, device, threads, cuda)
        here = this_machine(
            torch.__version__, self._device.type, aot_inductor.cuda_architecture(self._device)
        )
        lines = obstacles(artifact.details.get("machine", {}), here)
        if lines:
            raise RuntimeUnavailableError(
                f"{artifact.path} cannot run on this machine as device={device!r}: "
                f"{'; '.join(lines)}. Export the step again on a machine like this one."
            )

    def _program(self, spec: ProgramSpec) -> Program:
        path = self._artifact.file(spec.name)
        try:
            loaded = aot_inductor.load_package(path, self._device)
        except RuntimeError as error:
            raise ArtifactError(
                f"torch {torch.__version__} cannot load {path}: {str(error).splitlines()[0]}"
            ) from error

        def run(state: list[Tensor], hyper: list[Tensor], batch: list[Tensor]) -> list[Tensor]:
            # Compiled code reads memory as the contract says it lies.
            return loaded([*state, *hyper, *(tensor.contiguous() for tensor in batch)])

        return run
