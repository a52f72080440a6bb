"""Target ``torchscript``: one scripted module that holds the training state and trains it."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from operator import attrgetter

import torch
from torch import Tensor, fx, nn

from sam_export._compat import torchscript
from sam_export.artifact.contract import HYPER, STEP, StepContract
from sam_export.artifact.folder import Lowered, LoweredFile
from sam_export.errors import LoweringError
from sam_export.lower.draws import random_details
from sam_export.lower.result import lowered
from sam_export.lower.torchscript_methods import (
    CONSTANTS,
    STEP_COUNT,
    inference_source,
    method_names,
    module_source,
)
from sam_export.tracing.captured_step import CapturedStep
from sam_export.tracing.held import hold

TARGET = "torchscript"
FILE = "step.pt"


def lower(captured: CapturedStep) -> Lowered:
    """All programs of a step as the methods of one `torch.jit.ScriptModule`, in one file.

    The module holds parameters and buffers under torch's names, slots and hyper-parameters under
    those of the contract, and the number of steps. Its methods: ``forward(*batch) -> loss`` and
    ``step(*batch) -> Dict[str, Tensor]`` take one SAM step in place; ``evaluate(*inputs)``,
    ``evaluate_loss(*batch)``; ``set_hyper(name, value)``. The file also holds the source of a
    module that only evaluates, for `Session.export_model`.

    Raises:
        LoweringError: A name of the model collides with one of the module's, or an operator has no
            form in TorchScript.
    """
    contract = captured.contract
    modules = {name: _graph_module(program) for name, program in captured.programs.items()}
    graphs = {name: module.graph for name, module in modules.items()}
    root = nn.Module()
    for spec in contract.state:
        _refuse_name(spec.name, spec.role, contract)
        value = torch.from_numpy(captured.state[spec.name].copy())
        hold(root, spec.name, value, parameter=spec.role == "parameter")
    for hyper in contract.hyper:
        hold(root, HYPER + hyper.name, torch.tensor(hyper.defaults, dtype=torch.float64))
    for name, module in modules.items():
        for constant, tensor in _constants(module).items():
            hold(root, f"{CONSTANTS}.{name}.{constant}", tensor)
    # Periodic SAM goes by it, wherever in the period the step was captured.
    setattr(root, STEP_COUNT, int(captured.state[STEP]) if contract.every > 1 else 0)
    source = module_source(contract, captured.semantics, graphs)
    try:
        scripted = torchscript.scripted(root, source)
    except (RuntimeError, UnicodeError) as error:
        raise LoweringError(f"TorchScript does not compile the step: {error}") from error
    serving = inference_source(contract, captured.semantics, graphs["evaluate"])
    data = torchscript.script_bytes(scripted, {torchscript.SERVING: serving})
    files = dict.fromkeys(captured.programs, LoweredFile(FILE, data))
    details = {**random_details(captured, made_by="graph"), "portable": captured.portable}
    return lowered(captured, TARGET, files, details)


def _graph_module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def _constants(module: fx.GraphModule) -> Mapping[str, Tensor]:
    return {
        str(node.target): attrgetter(str(node.target))(module).detach()
        for node in module.graph.find_nodes(op="get_attr")
    }


def _refuse_name(name: str, role: str, contract: StepContract) -> None:
    own = ("slot", "memory", "average", "hyper", "rng", "counter", "scaler")
    taken = {*method_names(contract), *own, CONSTANTS, STEP_COUNT}
    first = name.partition(".")[0]
    for part in name.split("."):
        odd = not part.isascii() or not part.isprintable() or set(part) & set('"\\')
        if odd or keyword.iskeyword(part):
            why = "holds a character that it does not read" if odd else "is a keyword"
            raise LoweringError(
                f"The model's {name!r} has a name that TorchScript writes but cannot read back: "
                f"{part!r} {why}. Rename that module or parameter."
            )
    if role in ("parameter", "buffer") and first in taken:
        raise LoweringError(
            f"The model's {name!r} would hide {first!r} of the scripted module, which keeps "
            "torch's names. Rename it, or put the model into a module of its own."
        )
