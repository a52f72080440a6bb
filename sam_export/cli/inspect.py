"""``sam-export inspect``: what is in an artifact."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from sam_export.cli.console import format_bytes, print_table
from sam_export.cli.operators import operators_of

if TYPE_CHECKING:
    from sam_export.artifact.contract import StepContract, TensorSpec
    from sam_export.artifact.folder import Artifact

_EPILOG = """\
examples:
  sam-export inspect build/digits
  sam-export inspect build/digits --json | python -m json.tool

The op histogram needs onnx for an artifact of ONNX files and torch for one of torch's; compiled
code has none. Everything else needs NumPy only.
"""

_NOTED = ("in_place", "layout", "known_rounding")
"""Details that are said beside the tensors that they are about."""

_STATE_ROLES = ("parameter", "buffer", "slot", "memory", "average", "counter", "rng", "scaler")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="show what is in an artifact",
        description="Shows an artifact's contract (every input and output with role, dtype and "
        "shape), sizes, operators, semantics, hyper-parameters and versions. All files are checked "
        "against their hashes first.",
        epilog=_EPILOG,
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help="folder that `export` wrote")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the tables, or JSON."""
    from sam_export.artifact.folder import open_artifact

    artifact = open_artifact(args.artifact)
    operators, reason = operators_of(artifact)
    if args.json:
        print(json.dumps(_as_dict(artifact, operators), indent=2, ensure_ascii=False))
        return 0
    _print_overview(artifact)
    _print_programs(artifact)
    _print_operators(operators, reason)
    _print_details(artifact)
    _print_tensors(artifact)
    return 0


def _as_dict(artifact: Artifact, operators: dict[str, Counter[str]] | None) -> dict[str, Any]:
    counted = None
    if operators is not None:
        counted = {program: dict(counts.most_common()) for program, counts in operators.items()}
    return {
        "path": str(artifact.path),
        "target": artifact.target,
        "bytes": artifact.size,
        "files": {
            program: {"name": name, "bytes": artifact.file(program).stat().st_size}
            for program, name in artifact.files.items()
        },
        "contract": artifact.contract.to_dict(),
        "semantics": artifact.semantics.to_dict(),
        "hyper": {spec.name: list(spec.defaults) for spec in artifact.contract.hyper},
        "operators": counted,
        "versions": artifact.versions,
        "details": artifact.details,
    }


def _print_overview(artifact: Artifact) -> None:
    contract = artifact.contract
    hyper = ", ".join(
        f"{spec.name} {' / '.join(f'{value:g}' for value in spec.defaults)}"
        for spec in contract.hyper
    )
    groups = " + ".join(str(len(group)) for group in contract.groups)
    multiples = {name: f", a multiple of {n}" for name, n in contract.multiples.items()}
    dims = ", ".join(
        f"{name} >= {least}{multiples.get(name, '')}" for name, least in contract.dims.items()
    )
    semantics = ", ".join(f"{k} {v}" for k, v in artifact.semantics.to_dict().items())
    rows = [
        ["artifact", str(artifact.path)],
        ["target", artifact.target],
        ["size", format_bytes(artifact.size)],
        ["base optimizer", f"{contract.optimizer} over {groups} parameters"],
        ["perturbation", contract.perturbation],
        ["kind of SAM", _kind(contract)],
        ["averaged weights", contract.ema or "none"],
        ["mixed precision", _precision(contract)],
        ["hyper-parameters", hyper],
        ["constants", _constants(contract)],
        ["batch", f"a {contract.batch_kind} of {', '.join(spec.name for spec in contract.batch)}"],
        ["symbolic sizes", dims or "none"],
        ["semantics", semantics],
        ["made with", ", ".join(f"{name} {found}" for name, found in artifact.versions.items())],
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name.ljust(width)}  {value}")


def _kind(contract: StepContract) -> str:
    """Variant, period and ascent steps, where they are not SAM's own."""
    parts = [contract.variant]
    if contract.every > 1:
        parts.append(f"every {contract.every} steps")
    if contract.ascent_steps > 1:
        parts.append(f"{contract.ascent_steps} ascent steps")
    return ", ".join(parts)


def _precision(contract: StepContract) -> str:
    """What autocast casts to, and how the loss is scaled."""
    parts = [] if contract.autocast is None else [f"autocast {contract.autocast}"]
    scaling = contract.loss_scaling
    if scaling is not None:
        parts.append(
            f"loss scaled by {scaling.init_scale:g} at first (times {scaling.growth_factor:g} "
            f"after {scaling.growth_interval} steps without an overflow, times "
            f"{scaling.backoff_factor:g} after one with)"
        )
    return ", ".join(parts) or "none"


def _constants(contract: StepContract) -> str:
    """The base optimizer's options that are no graph inputs; per group where groups differ."""
    names = dict.fromkeys(name for group in contract.baked for name in group)
    values = {
        name: dict.fromkeys(str(group.get(name)) for group in contract.baked) for name in names
    }
    return ", ".join(f"{name} {' / '.join(found)}" for name, found in values.items()) or "none"


def _print_programs(artifact: Artifact) -> None:
    rows = []
    for program in artifact.contract.programs:
        path = artifact.file(program.name)
        size = format_bytes(path.stat().st_size)
        counts = [str(len(part)) for part in (program.inputs, program.outputs, program.feeds)]
        rows.append([program.name, path.name, size, *counts])
    print()
    headers = ["program", "file", "size", "inputs", "outputs", "new state"]
    print_table(headers, rows, "Programs")
    rows = []
    for role in _STATE_ROLES:
        specs = [spec for spec in artifact.contract.state if spec.role == role]
        if specs:
            elements = sum(math.prod(map(int, spec.shape)) for spec in specs)
            size = format_bytes(sum(map(_bytes, specs)))
            rows.append([role, str(len(specs)), f"{elements:,}", size])
    print()
    print_table(["state", "tensors", "elements", "size"], rows, "State")


def _print_operators(operators: dict[str, Counter[str]] | None, reason: str) -> None:
    print()
    if operators is None:
        print(f"Operators: {reason}")
        return
    total: Counter[str] = sum(operators.values(), Counter())
    rows = [
        [name, *(str(counts[name] or "") for counts in operators.values())]
        for name, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))
    ]
    rows.append(["all", *(str(counts.total()) for counts in operators.values())])
    print_table(["operator", *operators], rows, "Operators")


def _print_details(artifact: Artifact) -> None:
    details = {name: value for name, value in artifact.details.items() if name not in _NOTED}
    layout = artifact.details.get("layout")
    if layout is not None:
        details["gradient buffers hold"] = layout["update"]
        details["stock optimizer"] = layout["optimizer"]
    if details:
        print("\nDetails")
    for name, value in details.items():
        print(f"  {name}: {value if isinstance(value, str) else json.dumps(value)}")


def _print_tensors(artifact: Artifact) -> None:
    contract = artifact.contract
    rows = [
        [spec.name, spec.role, spec.description, _note(spec, artifact)] for spec in contract.inputs
    ]
    print()
    print_table(["input", "role", "type", "note"], rows, "Inputs")
    for program in contract.programs:
        headers = ["output", "role", "type", *(["becomes"] if program.feeds else [])]
        rows = [
            [spec.name, spec.role, spec.description, program.feeds.get(spec.name, "")]
            for spec in program.outputs
        ]
        print()
        print_table(headers, [row[: len(headers)] for row in rows], f"Outputs of {program.name}")


def _note(spec: TensorSpec, artifact: Artifact) -> str:
    """What else is to be said about an input: group, dtype in eager, how it is updated."""
    notes = []
    groups = artifact.contract.groups
    layout = artifact.details.get("layout", {})
    if spec.role == "parameter" and not spec.trainable:
        notes.append("not trained")
    elif len(groups) > 1:
        notes += [f"group {index}" for index, group in enumerate(groups) if spec.name in group]
    if spec.eager_dtype is not None:
        notes.append(f"{spec.eager_dtype} in eager")
    in_place = artifact.details.get("in_place", {})
    if spec.name in in_place:
        reason = in_place[spec.name]
        notes.append(f"two buffers: {reason}" if reason else "updated in place")
    if spec.name in layout.get("written", ()):
        notes.append("updated in place")
    elif spec.name in layout.get("trained", ()):
        notes.append("has a gradient buffer")
    if spec.name in artifact.details.get("known_rounding", {}):
        notes.append(f"stock update within {artifact.details['known_rounding'][spec.name]:.1e}")
    return ", ".join(notes)


def _bytes(spec: TensorSpec) -> int:
    import numpy as np

    return math.prod(map(int, spec.shape)) * np.dtype(spec.dtype).itemsize
