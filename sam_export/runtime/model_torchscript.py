"""The model to serve as a scripted module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sam_export._compat import torchscript
from sam_export.artifact.folder import Artifact
from sam_export.artifact.state_file import replace_whole, sync
from sam_export.errors import ArtifactError
from sam_export.tracing.held import hold


def write(artifact: Artifact, path: Path, state: Mapping[str, NDArray[Any]]) -> None:
    """Writes a scripted module on the CPU with parameters and buffers under torch's names.

    Its ``forward`` takes the inputs as arguments, checks them, and returns what the step's own
    ``evaluate`` does: a tensor, or a dict of them.

    Raises:
        ArtifactError: The artifact was written before there was such a form.
        OSError: The disk refuses; what was there is still whole.
    """
    step = artifact.file("evaluate")
    source = torchscript.text_in(step, torchscript.SERVING)
    if not source:
        raise ArtifactError(
            f"{step} holds no form of the model to serve: it was written by an older version. "
            "Export the step again, and restore a checkpoint of this session there."
        )
    root = torch.nn.Module()
    for spec in artifact.contract.state:
        if spec.name in state:
            value = torch.from_numpy(np.array(state[spec.name], order="C"))
            hold(root, spec.name, value, parameter=spec.role == "parameter")
    constants = "constants.evaluate."
    loaded = torchscript.load_scripted(step, torch.device("cpu"))
    for name, tensor in loaded.named_buffers():
        if name.startswith(constants):
            hold(root, name, tensor)
    data = torchscript.script_bytes(torchscript.scripted(root.eval(), source))

    def fill(partial: Path) -> None:
        partial.write_bytes(data)
        sync(partial)

    replace_whole(path, fill)
