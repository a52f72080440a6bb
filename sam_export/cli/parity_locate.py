"""``sam-export parity --locate DIR``: after a failed check, the first node that differs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam_export.cli.console import stage
from sam_export.cli.errors import CommandError

if TYPE_CHECKING:
    from sam_export.parity.locate import Location
    from sam_export.parity.report import ParityReport
    from sam_export.step.train_step import TrainStep


def add_locate(parser: Any) -> None:
    """Adds the argument --locate."""
    parser.add_argument(
        "--locate",
        metavar="DIR",
        help="after a failed check, find the first node of each failed target's graph that "
        "differs, and write a reproduction of it to DIR/<target>; DIR must not exist; CPU only",
    )


def check_locate(folder: str | None, device: str) -> None:
    """Refuses a folder that is there, and another device than the CPU, before minutes are spent.

    Raises:
        CommandError: The folder exists, or the check is not on the CPU.
    """
    if folder is not None and device != "cpu":
        raise CommandError(
            f"--locate searches on the CPU, and --device {device} runs other kernels. Leave out "
            "--device: if the check fails there, too, --locate finds the node; if it does not, the "
            f"difference is one of {device}'s kernels, or of how the step is written for it."
        )
    if folder is not None and os.path.lexists(folder):
        raise CommandError(f"--locate {folder}: it is there already; give a folder yet to be made.")


@dataclass(frozen=True)
class Failed:
    """What of a failed check a search starts from.

    Attributes:
        target: The target that differs.
        step: Number, from 1, of a step from eager's state that differs.
        artifact: The user's own, which differs; None: one that is built for the search.
        in_stages: Whether only its stages differ, which cannot be searched.
    """

    target: str
    step: int
    artifact: Path | None = None
    in_stages: bool = False


def failed_steps(report: ParityReport, artifacts: Mapping[str, Path]) -> dict[str, Failed]:
    """What ran and failed, by the name of its row.

    Lock-step runs each step from eager's state, as the search does; where only the free run
    differs, it is step 1. Where a target differs with its stages only, the target itself is
    searched; where an artifact differs as one graph and in its stages, the one graph.

    Args:
        report: Of the check.
        artifacts: Those that it was given, by the names of their rows.

    Raises:
        ArtifactError: One of them cannot be opened any more.
    """
    from sam_export.artifact.folder import open_artifact
    from sam_export.parity.check import IN_STAGES

    found: dict[str, Failed] = {}
    ok = {row.name: row.ok for row in report.targets}
    for row in report.targets:
        steps = [each.step for each in row.failed if each.mode == "lock-step"]
        if not row.failed:
            continue
        number = max(1, min(steps, default=1))
        whole = row.name.removesuffix(IN_STAGES)
        if whole in artifacts:
            in_stages = row.name != whole
            if not in_stages or ok[whole]:
                path = artifacts[whole]
                found[row.name] = Failed(open_artifact(path).target, number, path, in_stages)
        else:
            target = row.name.removesuffix(", stages")
            found.setdefault(target, Failed(target, number))
    return found


def run_locate(
    step: TrainStep,
    batches: Sequence[Any],
    failed: Mapping[str, Failed],
    folder: str,
    dynamic: Any = "batch",
) -> list[Location]:
    """Looks for the first node that differs in each failed target, and prints what it finds.

    Args:
        step: As the check had it.
        batches: As the check had them.
        failed: Where to search, by name; see `failed_steps`.
        folder: Gets a folder per name in which a node is found.
        dynamic: As the check had it.

    Returns:
        One location per target that can be searched; a line says why another one cannot.
    """
    from sam_export.errors import SamExportError
    from sam_export.parity.interpret import StepGraph
    from sam_export.parity.locate import captured_of, locate

    for name in [name for name, start in failed.items() if start.in_stages]:
        print(
            f"{name}: not searched: the step as one graph is equal, and only that can be. A loss "
            "that differs is of ascent; a gradient's norm of what ascent gives; the perturbed loss "
            "or the perturbation's norm of descent; new weights after right losses and norms are "
            "of what descent gives, or of update."
        )
    searched = {name: start for name, start in failed.items() if not start.in_stages}
    if not searched:
        return []
    captured = captured_of(step, batches[0], dynamic)
    locations = []
    for name, start in searched.items():
        state = captured.state
        try:
            for index in range(start.step - 1):
                state = StepGraph(captured, batches[index % len(batches)], state).next_state()
            with stage(f"locating the difference of {name}, step {start.step}"):
                location = locate(
                    captured,
                    start.target,
                    batches[(start.step - 1) % len(batches)],
                    state=state,
                    artifact=start.artifact,
                    out=os.path.join(folder, _folder_of(name)),
                )
        except SamExportError as error:
            print(f"{name}: the difference was not located: {error}")
            continue
        print(location)
        locations.append(location)
    return locations


def _folder_of(name: str) -> str:
    """One folder per row; two artifacts whose folders share a name are rows with whole paths."""
    return name.strip(os.sep).replace(os.sep, "_")
