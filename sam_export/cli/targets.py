"""``sam-export targets``: what this machine can export to and train with."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sam_export.cli.console import print_table
from sam_export.runtime.detect import Missing, RuntimeStatus, machine_status

_EPILOG = """\
examples:
  sam-export targets
  sam-export targets --json
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "targets",
        help="show which targets work on this machine",
        description="Shows the engines of this machine with their versions and execution "
        "providers, and for each target what is missing to export to it or to train with it; for "
        "CUDA, which libraries, or the driver.",
        epilog=_EPILOG,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the tables."""
    status = machine_status()
    if args.json:
        print(json.dumps(status.to_dict(), indent=2))
        return 0
    print_table(
        ["package", "version", "execution providers"],
        [
            [runtime.name, runtime.version or "not installed", _providers(runtime)]
            for runtime in status.runtimes
        ],
        "Runtimes",
    )
    print()
    print_table(
        ["target", "export", "train"],
        [
            [target.target, _verdict(target.export), _verdict(target.run)]
            for target in status.targets
        ],
        "Targets",
    )
    advice = [
        f"{target.target}: {purpose} needs {item.what}: {item.install}"
        for target in status.targets
        for purpose, items in (("exporting", target.export), ("training", target.run))
        for item in items
    ]
    problems = [
        f"{runtime.name}: {runtime.problem}" for runtime in status.runtimes if runtime.problem
    ]
    problems += [
        f"{runtime.name}: training with device=cuda cannot start: {runtime.cuda_problem}"
        for runtime in status.runtimes
        if runtime.cuda_problem
    ]
    for line in ("", *advice, *problems) if advice or problems else ():
        print(line)
    return 0


def _verdict(missing: tuple[Missing, ...]) -> str:
    return "missing" if missing else "ready"


def _providers(runtime: RuntimeStatus) -> str:
    if runtime.problem:
        return "cannot be used"
    return ", ".join(
        f"{name} (cannot start)" if runtime.cuda_problem and name.startswith("CUDA") else name
        for name in runtime.providers
    )
