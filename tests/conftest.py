"""Tests that this environment cannot run are skipped: of targets whose runtime is not here."""

from __future__ import annotations

import pytest

from sam_export.runtime.detect import TARGETS, target_status


@pytest.fixture(autouse=True)
def _target_can_run(request: pytest.FixtureRequest) -> None:
    """Skips a test of a target that cannot run here, and says what it lacks.

    The target is the parameter ``target``, or an argument of the marker ``needs``.
    """
    call = getattr(request.node, "callspec", None)
    targets = [call.params.get("target")] if call is not None else []
    targets += [name for mark in request.node.iter_markers("needs") for name in mark.args]
    for target in targets:
        missing = target_status(target).run if target in TARGETS else ()
        if missing:
            pytest.skip(f"{target} needs {missing[0].what}")
