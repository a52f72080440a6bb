"""The model alone, to be served: its forward in eval mode, with the weights inside, in one file."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from sam_export.artifact.contract import AVERAGE, SEED
from sam_export.artifact.folder import Artifact
from sam_export.errors import ArtifactError, SessionError

_ONNX = (".onnx", "sam_export.runtime.model_onnx")

WRITERS = {
    "onnx": _ONNX,
    "onnx-training": _ONNX,
    "ort-artifacts": _ONNX,
    "torchscript": (".pt", "sam_export.runtime.model_torchscript"),
    "torch-compile": (".pt2", "sam_export.runtime.model_exported"),
}
"""Target to the ending of the file that is made of it, and the module whose ``write`` makes it."""


def write_model(
    artifact: Artifact,
    path: Path,
    read: Callable[[Sequence[str]], Mapping[str, NDArray[Any]]],
    average: bool = False,
) -> None:
    """Writes the program ``evaluate`` of an artifact with its state inside, whole or not at all.

    Args:
        artifact: Whose model.
        path: The file; its ending says which form is meant. One that is there is replaced.
        read: Gives state by name.
        average: Whether averages take the place of what they are averages of.

    Raises:
        SessionError: The target has no such form, or another one than ``path`` asks for; the model
            draws random numbers in eval mode; or ONNX Runtime does not load what became of it.
        ArtifactError: The artifact is not there any more, or has changed; or the disk refuses.
    """
    _, module = _writer(artifact.target, path)
    inputs = artifact.contract.program("evaluate").inputs
    if SEED in inputs:
        raise SessionError(
            "The model draws random numbers in eval mode, too, from this step's own generator, "
            "which a file without a session does not have. Make it draw in training mode only "
            "(`if self.training:`, or `dropout(x, training=self.training)`) and export the step "
            "again."
        )
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder; a model is one file. Give a file name.")
    _check_unchanged(artifact)
    known = {spec.name for spec in artifact.contract.state}
    held = {name: name for name in inputs if name in known}
    if average:
        held |= {name: AVERAGE + name for name in held if AVERAGE + name in known}
    found = read(list(held.values()))
    state = {name: found[source] for name, source in held.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        importlib.import_module(module).write(artifact, path, state)
    except OSError as error:
        raise ArtifactError(
            f"Cannot write the model {path}: {error}. One that was there is still whole."
        ) from error


def check_path(target: str, path: Path) -> None:
    """Refuses early what `write_model` would refuse: no form for the target, or another ending.

    Raises:
        SessionError: With the ending, or the targets, that it could be.
    """
    _writer(target, path)


def _writer(target: str, path: Path) -> tuple[str, str]:
    others = [name for name, (suffix, _) in WRITERS.items() if suffix == path.suffix]
    if target not in WRITERS:
        raise SessionError(
            f"A session of target {target!r} cannot write a model to serve: its programs are "
            "compiled code that takes the weights as inputs. Save a checkpoint, and restore it in "
            f"a session of the same step exported to {_listed(others or list(WRITERS))}."
        )
    suffix, _ = WRITERS[target]
    if path.suffix != suffix:
        advice = f"Give a name that ends in {suffix}"
        if others:
            advice += (
                f", or save a checkpoint and restore it in a session of the same step exported to "
                f"{_listed(others)}"
            )
        raise SessionError(
            f"{path}: a session of target {target!r} writes a model as a {suffix} file. {advice}."
        )
    return WRITERS[target]


def _listed(names: list[str]) -> str:
    return " or ".join(map(repr, names))


def _check_unchanged(artifact: Artifact) -> None:
    """The file that is read again here has to be the one that the session was made of."""
    path = artifact.file("evaluate")
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read any more: {error}. Writing a model needs the artifact that "
            "the session was loaded from."
        ) from error
    if found != artifact.digests[path.name]:
        raise ArtifactError(
            f"{path} has changed since this session was loaded from it. Save a checkpoint, load "
            "the artifact anew, restore the checkpoint there and write the model."
        )
