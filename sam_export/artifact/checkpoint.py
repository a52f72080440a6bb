"""A training run's state in one file, whole or not there.

A safetensors file whose header holds, as JSON under ``sam_export.checkpoint``: ``format``,
``step_count``, ``hyper`` (the current values), ``optimizer`` and ``fingerprint``. The fingerprint
covers the state's part of the contract and not the target: a checkpoint of one target's session
restores into every other target of the same step.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from sam_export.artifact.contract import StepContract
from sam_export.artifact.state_file import (
    Shapes,
    differences,
    first_few,
    read_state,
    replace_whole,
    shapes_of,
    write_state,
)
from sam_export.errors import ArtifactError

FORMAT = 1
"""Number of this layout. A reader refuses every other one."""

_KEY = "sam_export.checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        state: Every state tensor, in the contract's order.
        step_count: Steps that had been run.
        hyper: Hyper-parameter to its values, one per parameter group.
    """

    state: dict[str, NDArray[Any]]
    step_count: int
    hyper: dict[str, tuple[float, ...]]


def fingerprint(contract: StepContract) -> str:
    """SHA-256 of what state means: names, roles, dtypes, shapes, parameter groups, optimizer."""
    state = [[spec.name, spec.role, spec.dtype, spec.shape] for spec in contract.state]
    meaning = json.dumps([state, contract.groups, contract.optimizer])
    return hashlib.sha256(meaning.encode()).hexdigest()


def save_checkpoint(
    path: str | os.PathLike[str],
    state: Mapping[str, NDArray[Any]],
    step_count: int,
    hyper: Mapping[str, Sequence[float]],
    contract: StepContract,
) -> None:
    """Writes a checkpoint; a file that is there is replaced once the new one is on the disk.

    Args:
        path: The file; missing parent folders are made.
        state: Every state tensor of the contract.
        step_count: Steps that have been run.
        hyper: Current hyper-parameters, one value per parameter group.
        contract: The step that this is the state of.

    Raises:
        ArtifactError: State or hyper-parameters do not match the contract, ``path`` is a folder, or
            the disk refuses; the file that was there is untouched then.
    """
    path = Path(path)
    lines = differences(shapes_of(state), contract.state)
    if lines:
        raise ArtifactError(f"The state to save does not match the contract: {first_few(lines)}.")
    header = {
        "format": FORMAT,
        "step_count": step_count,
        "hyper": {name: [float(value) for value in values] for name, values in hyper.items()},
        "optimizer": contract.optimizer,
        "fingerprint": fingerprint(contract),
    }
    _check_values(header, contract, path)
    metadata = {_KEY: json.dumps(header, allow_nan=False)}
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder; a checkpoint is one file. Give a file name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, lambda partial: write_state(partial, state, metadata))
    except OSError as error:
        raise ArtifactError(
            f"Cannot write the checkpoint {path}: {error}. One that was there is still whole."
        ) from error


def load_checkpoint(path: str | os.PathLike[str], contract: StepContract) -> Checkpoint:
    """Reads a checkpoint that belongs to ``contract``.

    Raises:
        ArtifactError: The file is missing, damaged, no checkpoint, of another format, or of
            another model or optimizer.
    """
    path = Path(path)
    header: dict[str, Any] = {}

    def check(shapes: Shapes, metadata: Mapping[str, str]) -> None:
        header.update(_header(metadata, path))
        _check_origin(header, shapes, contract, path)
        _check_values(header, contract, path)

    state = read_state(path, check)
    return Checkpoint(
        state={spec.name: state[spec.name] for spec in contract.state},
        step_count=header["step_count"],
        hyper={
            spec.name: tuple(float(value) for value in header["hyper"][spec.name])
            for spec in contract.hyper
        },
    )


def _header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    if _KEY not in metadata:
        raise ArtifactError(
            f"{path} holds tensors but is no checkpoint: its header has no {_KEY!r}. Give a file "
            "that Session.save wrote."
        )
    try:
        header = json.loads(metadata[_KEY])
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: its header is not JSON: {error}.") from error
    found = header.get("format") if isinstance(header, dict) else None
    if type(found) is not int or found != FORMAT:
        raise ArtifactError(
            f"{path} has checkpoint format {found!r}; this version of sam_export reads format "
            f"{FORMAT}. Use the version that wrote it."
        )
    return dict(header)


def _check_origin(
    header: Mapping[str, Any], shapes: Shapes, contract: StepContract, path: Path
) -> None:
    saved = header.get("optimizer")
    lines = differences(shapes, contract.state)
    if lines:
        raise ArtifactError(
            f"{path} is a checkpoint of another model or optimizer: {first_few(lines)}. It was "
            f"saved with {saved}, this step has {contract.optimizer}."
        )
    if header.get("fingerprint") != fingerprint(contract):
        reason = (
            "other roles or parameter groups"
            if saved == contract.optimizer
            else f"the optimizer {saved}, this step has {contract.optimizer}"
        )
        raise ArtifactError(
            f"{path} is a checkpoint of another step: its tensors fit, but it was saved with "
            f"{reason}. Restore it into a session of the step that saved it."
        )


def _check_values(header: Mapping[str, Any], contract: StepContract, path: Path) -> None:
    count, hyper = header.get("step_count"), header.get("hyper")
    if type(count) is not int or count < 0:
        raise ArtifactError(f"{path}: step_count is {count!r}; expected a count of steps.")
    expected = {spec.name: len(spec.defaults) for spec in contract.hyper}
    found = (
        {name: len(values) if _numbers(values) else None for name, values in hyper.items()}
        if isinstance(hyper, dict)
        else None
    )
    if found != expected:
        raise ArtifactError(
            f"{path}: its hyper-parameters are {hyper!r}; this step has "
            f"{', '.join(f'{name} ({size})' for name, size in expected.items())}, in brackets the "
            "number of parameter groups, each a finite number."
        )


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) in (int, float) and abs(value) <= sys.float_info.max for value in values
    )
