"""``sam-export parity --self-test``: does the parity check find what it is there to find?"""

from __future__ import annotations

from collections.abc import Sequence

from sam_export.cli.console import PhaseBars, stage


def run(targets: Sequence[str], json_path: str | None) -> int:
    """Puts wrong steps into each target, and prints which of them the check found.

    Args:
        targets: Names of targets that this machine can export to and run.
        json_path: Where to write the report as JSON, too; None: nowhere.

    Returns:
        0: every wrong step was caught and every right one passed; 1: one slipped through, or a
        right one failed; 2: a target could not be built or run, and nothing else was wrong.
    """
    from sam_export.parity.self_test import self_test

    label = f"self-test of the parity check on {', '.join(targets)}"
    with stage(label, spin=False), PhaseBars() as bars:
        report = self_test(targets, progress=bars.show)
    print(report)
    if json_path:
        report.to_json(json_path)
        print(f"written: {json_path}")
    if report.slipped:
        return 1
    return 0 if report.ok else 2
