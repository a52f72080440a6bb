"""What every lowering returns, put together in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from sam_export._version import __version__
from sam_export.artifact.folder import Lowered, LoweredFile
from sam_export.tracing.captured_step import CapturedStep


def lowered(
    captured: CapturedStep,
    target: str,
    files: Mapping[str, LoweredFile],
    details: Mapping[str, Any],
    packages: Sequence[str] = ("torch", "numpy"),
    others: Sequence[LoweredFile] = (),
) -> Lowered:
    """The files of a target with the step's contract, semantics and state.

    Args:
        captured: The step.
        target: Name of the target.
        files: Program name to its file.
        details: What the target tells its engine and the user.
        packages: Those whose versions shaped the files, by their names on PyPI.
        others: Files that hold no program.
    """
    return Lowered(
        target=target,
        contract=captured.contract,
        semantics=captured.semantics,
        files=dict(files),
        state=captured.state,
        versions={"sam_export": __version__, **{name: version(name) for name in packages}},
        details=dict(details),
        others=tuple(others),
    )
