"""Engine for the target ``torchscript``: a scripted module that holds the state itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam_export._compat import torchscript
from sam_export.artifact.contract import HYPER
from sam_export.artifact.folder import Artifact
from sam_export.errors import ArtifactError
from sam_export.runtime.cuda_options import CudaOptions
from sam_export.runtime.torch_engine import Changes, TorchEngine


class TorchScriptEngine(TorchEngine):
    """Runs the methods of the scripted module; its own tensors are the training state.

    Raises:
        ArtifactError: The file is no scripted module, or not the one of the contract.
        RuntimeUnavailableError: CUDA was asked for and is not there.
    """

    provider = "torchscript"

    def __init__(
        self,
        artifact: Artifact,
        device: str,
        threads: int | None = None,
        cuda: CudaOptions | None = None,
    ) -> None:
        super().__init__(artifact, device, threads, cuda)
        path = artifact.file("step")
        try:
            self._module: Any = torchscript.load_scripted(path, self._device)
        except RuntimeError as error:
            raise ArtifactError(
                f"torch {torch.__version__} cannot read {path}: {str(error).splitlines()[0]} "
                f"It was written with torch {artifact.versions.get('torch', 'of unknown version')}."
            ) from error
        self._held: dict[str, Tensor] = {
            **dict(self._module.named_parameters()),
            **dict(self._module.named_buffers()),
        }
        self._changed = Changes()
        self._refuse_other(artifact)

    def bind(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Copies the whole state into the module."""
        with torch.no_grad():
            for name, value in state.items():
                self._held[name].copy_(torch.from_numpy(np.array(value, order="C")))

    def run(
        self, program: str, batch: Sequence[Any], hyper: Mapping[str, NDArray[Any]]
    ) -> dict[str, Any]:
        """Runs one program on the current state; see `runtime.engine.Engine`."""
        spec = self._artifact.contract.program(program)
        for name, values in self._changed.of(hyper):
            self._held[HYPER + name].copy_(torch.from_numpy(values))
        method = getattr(self._module, f"{program}_unchecked")
        with torch.no_grad():
            results = method(*map(self._tensor, batch))
        names = [output.name for output in spec.outputs if output.name not in spec.feeds]
        return dict(zip(names, results, strict=True))

    def current(self, names: Sequence[str]) -> dict[str, Any]:
        """The named state tensors where they are."""
        return {name: self._held[name] for name in names}

    def read(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Copies of the named state tensors, on the host."""
        return {name: self.to_numpy(self._held[name]) for name in names}

    def _refuse_other(self, artifact: Artifact) -> None:
        for spec in (*artifact.contract.state, *artifact.contract.hyper_inputs):
            found = "missing"
            if spec.name in self._held:
                tensor = self._held[spec.name]
                dtype = str(tensor.dtype).removeprefix("torch.")
                found = f"{dtype}[{', '.join(map(str, tensor.shape))}]"
            if found != spec.description:
                raise ArtifactError(
                    f"{artifact.file('step')} is not the step of its contract: {spec.name!r} is "
                    f"{found}, the contract says {spec.description}. Export the artifact again."
                )
        for program in artifact.contract.programs:
            if not hasattr(self._module, f"{program.name}_unchecked"):
                raise ArtifactError(
                    f"{artifact.file('step')} has no method {program.name!r}, which the contract "
                    "names. Export the artifact again."
                )
