"""Target ``aot-inductor``: each program compiled to machine code, for this machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sam_export._compat import aot_inductor, inductor
from sam_export.artifact.checkpoint import fingerprint
from sam_export.artifact.contract import (
    BY_EXAMPLES,
    ProgramSpec,
    StepContract,
    discarded_if_not_finite,
)
from sam_export.artifact.folder import Lowered, LoweredFile
from sam_export.artifact.machine import this_machine
from sam_export.errors import LoweringError
from sam_export.lower.draws import in_aten, random_details
from sam_export.lower.mixed_norms import norms_in_float32
from sam_export.lower.plain_adds import without_factors
from sam_export.lower.result import lowered
from sam_export.tracing.captured_step import CapturedStep
from sam_export.tracing.in_place import in_place, scalar_positions
from sam_export.tracing.trace import symbolic

TARGET = "aot-inductor"


def lower(captured: CapturedStep, device: str = "cpu") -> Lowered:
    """The programs of a step as ``.pt2`` packages of AOTInductor.

    A package takes state, hyper-parameters and batch in the order of the contract, and returns the
    outputs that are not state; it writes the new state over the old. State tensors without
    dimensions are passed as vectors of one element. It holds no weights.

    Args:
        captured: The step.
        device: What to compile for: ``cpu`` or ``cuda``, which must be here.

    Raises:
        LoweringError: CUDA was asked for and is absent; or the compiler failed.
    """
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise LoweringError(
            f"device={device!r} was asked for, but this torch ({torch.__version__}) finds no CUDA "
            "device. A step is compiled on a machine like the one that will run it."
        )
    files = {
        spec.name: LoweredFile(f"{spec.name}.pt2", _compiled(captured, spec, target))
        for spec in captured.contract.programs
    }
    machine = this_machine(torch.__version__, target.type, aot_inductor.cuda_architecture(target))
    details = {
        "machine": machine,
        "fingerprint": fingerprint(captured.contract),  # for checkpoints of other programs
        **random_details(captured, made_by="graph"),
        "portable": captured.portable,
    }
    return lowered(captured, TARGET, files, details)


def _compiled(captured: CapturedStep, spec: ProgramSpec, device: torch.device) -> bytes:
    program = _mutating(captured, spec, device)
    try:
        return aot_inductor.package_bytes(program, eager_random=bool(captured.random_ops))
    except Exception as error:
        raise LoweringError(
            f"AOTInductor does not compile program {spec.name!r} for {device}: {error}"
        ) from error


def _mutating(
    captured: CapturedStep, spec: ProgramSpec, device: torch.device
) -> torch.export.ExportedProgram:
    """The program as one that writes its state inputs."""
    contract = captured.contract
    program = without_factors(norms_in_float32(in_aten(captured.programs[spec.name])))
    graph = inductor.on_device(program, device)
    scalars = scalar_positions(contract, spec)
    discarded = discarded_if_not_finite(spec, captured.semantics)
    inputs = contract.inputs_of(spec)
    hypers = sum(item.role == "hyper" for item in inputs)
    states = len(inputs) - hypers - len(contract.fed(spec))
    run = in_place(graph, spec, discarded, scalars)

    class Program(torch.nn.Module):
        def forward(self, *given: Tensor) -> list[Tensor]:
            tensors = list(given)
            split = states + hypers
            return run(tensors[:states], tensors[states:split], tensors[split:])

    symbols: dict[str, Any] = {}
    examples, shapes = [], []
    for index, item in enumerate(inputs):
        marks = {d: name for d, name in enumerate(item.shape) if isinstance(name, str)}
        for name in marks.values():
            symbols.setdefault(name, _dim(contract, spec, name))
        # Any size will do but 0 and 1, which torch takes for constants.
        sizes = [
            max(4, contract.dims[n]) * contract.multiples.get(n, 1) if isinstance(n, str) else n
            for n in item.shape
        ]
        shape = (1,) if index in scalars else tuple(sizes)
        dtype = getattr(torch, item.dtype)
        examples.append(torch.zeros(shape, dtype=dtype, device=device))
        shapes.append({d: symbols[name] for d, name in marks.items()})
    return inductor.exported(Program(), tuple(examples), tuple(shapes))


def _dim(contract: StepContract, spec: ProgramSpec, name: str) -> Any:
    """A symbolic size of a program, with its least value; in a step with parts, a multiple."""
    least = contract.dims[name]
    if spec.name not in BY_EXAMPLES:
        return symbolic(name, 1, min(least, 1))
    return symbolic(name, contract.multiples.get(name, 1), least)
