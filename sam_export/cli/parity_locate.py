"""``sam-export parity --locate DIR``: after a failed check, the first node that differs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
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
        "differs, and write a reproduction of it to DIR/<target>; DIR must not exist",
    )


def check_locate(folder: str | None) -> None:
    """Refuses a folder that is there, before minutes are spent.

    Raises:
        CommandError: It exists.
    """
    if folder is not None and os.path.lexists(folder):
        raise CommandError(f"--locate {folder}: it is there already; give a folder yet to be made.")


def failed_steps(report: ParityReport) -> dict[str, int]:
    """Target that ran and failed to the number, from 1, of a step from eager's state that differs.

    Lock-step runs each step from eager's state, as the search does; where only the free run
    differs, it is step 1.
    """
    found = {}
    for target in report.targets:
        steps = [row.step for row in target.failed if row.mode == "lock-step"]
        if target.failed:
            found[target.name] = max(1, min(steps, default=1))
    return found


def run_locate(
    step: TrainStep,
    batches: Sequence[Any],
    failed: Mapping[str, int],
    folder: str,
    dynamic: Any = "batch",
) -> list[Location]:
    """Looks for the first node that differs in each failed target, and prints what it finds.

    Args:
        step: As the check had it.
        batches: As the check had them.
        failed: Target to the number of a step that differs; see `failed_steps`.
        folder: Gets a folder per target in which a node is found.
        dynamic: As the check had it.

    Returns:
        One location per target that can be searched; a line says why another one cannot.
    """
    from sam_export.errors import SamExportError
    from sam_export.parity.interpret import StepGraph
    from sam_export.parity.locate import captured_of, locate

    captured = captured_of(step, batches[0], dynamic)
    locations = []
    for target, number in failed.items():
        state = captured.state
        try:
            for index in range(number - 1):
                state = StepGraph(captured, batches[index % len(batches)], state).next_state()
            with stage(f"locating the difference of {target}, step {number}"):
                location = locate(
                    captured,
                    target,
                    batches[(number - 1) % len(batches)],
                    state=state,
                    out=os.path.join(folder, target),
                )
        except SamExportError as error:
            print(f"{target}: the difference was not located: {error}")
            continue
        print(location)
        locations.append(location)
    return locations
