"""The stages of a staged step as methods of the scripted module.

``ascent(*batch, given)``, ``descent(*batch, given)`` and ``update(given)``, where ``given`` is a
``Dict[str, Tensor]``. Each returns what it was given and its own results with it, so that what one
returns is what the next is given, and a pipeline replaces in between what it averages:
``gradient.<parameter>`` and ``perturbed_gradient.<parameter>``. ``ascent`` is given ``{}``, or, for
a further part of a batch, ``running.<buffer>`` as the part before left them and ``part``.
"""

from __future__ import annotations

import json

from sam_export.artifact.contract import MOVED, RUNNING, ProgramSpec, StepContract
from sam_export.artifact.semantics import Semantics
from sam_export.lower.torchscript_calls import arguments_of, batch_checks, reported
from sam_export.lower.torchscript_source import attribute, indented


def checked_stage(contract: StepContract, semantics: Semantics, spec: ProgramSpec) -> list[str]:
    """The source of one of these methods."""
    names, arguments = arguments_of(contract, spec)
    given, found, results = names.make("given"), names.make("found"), names.make("results")
    batch = [arguments[item.name] for item in contract.batch if item.name in arguments]
    listed = "".join(f", {argument}: Tensor" for argument in batch)
    body: list[str] = []
    for item in contract.carried:
        if item.name not in arguments:
            continue
        local, key = arguments[item.name], json.dumps(item.name)
        otherwise = ""
        if item.role == "part":
            device = f"{attribute(contract.state[0].name)}.device"
            otherwise = f"torch.zeros([], dtype=torch.int64, device={device})"
        elif item.role == "running" and spec.name == "ascent":
            otherwise = attribute(item.name.removeprefix(RUNNING))
        if otherwise:
            body.append(f"{local} = {given}[{key}] if {key} in {given} else {otherwise}")
            continue
        text = f"{spec.name} needs {item.name}, which the stage before returns"
        body += [
            f"if not {key} in {given}:",
            f"    raise ValueError({json.dumps(text)})",
            f"{local} = {given}[{key}]",
        ]
    body += batch_checks(contract, spec, arguments)
    call = f"self.{spec.name}_unchecked({', '.join(arguments.values())})"
    outputs = reported(spec)
    body.append(f"{results} = {call}")
    if spec.name == "update" and semantics.on_nonfinite == "raise":
        place = [output.name for output in outputs].index("finite")
        text = (
            "the step is not finite: a loss, a norm or a gradient of one of its passes was not; "
            "nothing was changed. Look at the batches, or lower lr or rho."
        )
        body += [
            f"if not bool({results}[{place}]):",
            f"    raise ValueError({json.dumps(text)})",
        ]
    body += [
        f"{found}: Dict[str, Tensor] = {{}}",
        f"for key, value in {given}.items():",
        f"    {found}[key] = value",
    ]
    for index, output in enumerate(outputs):
        name = output.name
        if output.role == "running":
            name = name.replace(MOVED, RUNNING, 1)
        body.append(f"{found}[{json.dumps(name)}] = {results}[{index}]")
    first = f"def {spec.name}(self{listed}, {given}: Dict[str, Tensor]) -> Dict[str, Tensor]:"
    return [first, *indented([*body, f"return {found}"])]
