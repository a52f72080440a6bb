"""The model to serve as a `torch.export` program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam_export._compat import inductor
from sam_export.artifact.folder import Artifact
from sam_export.artifact.state_file import replace_whole, sync
from sam_export.artifact.tree import unflatten
from sam_export.errors import SessionError
from sam_export.tracing.held import hold


def write(artifact: Artifact, path: Path, state: Mapping[str, NDArray[Any]]) -> None:
    """Writes a program on the CPU with parameters and buffers under torch's names.

    It takes the inputs as the model does, by position or by name, and returns what the model
    returns. Sizes that were symbolic in the step are so here.

    Raises:
        SessionError: torch does not export the model with its sizes symbolic.
        OSError: The disk refuses; what was there is still whole.
    """
    contract = artifact.contract
    spec = contract.program("evaluate")
    run = inductor.load_exported(artifact.file("evaluate"), torch.device("cpu"))
    names = [name for name in spec.inputs if name in state]
    inputs = [item for item in contract.inputs_of(spec) if item.role == "input"]

    class Model(torch.nn.Module):
        def forward(self, *given: Tensor, **named: Tensor) -> Any:
            batch = [*given, *(named[item.name] for item in inputs if item.name in named)]
            return unflatten(contract.output_tree, run(*(held[name] for name in names), *batch))

    model = Model()
    for item in contract.inputs_of(spec):
        if item.name in state:
            value = torch.from_numpy(np.array(state[item.name], order="C"))
            hold(model, item.name, value, parameter=item.role == "parameter")
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    symbols: dict[str, Any] = {}
    examples: dict[str, Tensor] = {}
    shapes: dict[str, dict[int, Any]] = {}
    for item in inputs:
        marks = {d: name for d, name in enumerate(item.shape) if isinstance(name, str)}
        for name in marks.values():
            symbols.setdefault(name, torch.export.Dim(name, min=min(contract.dims[name], 1)))
        # Any size will do but 0 and 1, which torch takes for constants.
        sizes = [max(4, contract.dims[n]) if isinstance(n, str) else n for n in item.shape]
        examples[item.name] = torch.zeros(sizes, dtype=getattr(torch, item.dtype))
        shapes[item.name] = {d: symbols[name] for d, name in marks.items()}
    by_name = contract.batch_kind == "dict"
    try:
        program = inductor.exported_model(model.eval(), examples, shapes, by_name)
    except Exception as error:  # torch's own, which derive from nothing narrower
        raise SessionError(
            f"torch {torch.__version__} does not export the model alone: {error}. Export the step "
            "to target 'torchscript' or 'onnx', restore a checkpoint of this session there, and "
            "write the model from that."
        ) from error
    data = inductor.exported_bytes(program)

    def fill(partial: Path) -> None:
        partial.write_bytes(data)
        sync(partial)

    replace_whole(path, fill)
