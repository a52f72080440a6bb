"""Loss and accuracy of a session's current weights over validation data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sam_export.cli.errors import CommandError

if TYPE_CHECKING:
    from sam_export.artifact.contract import StepContract
    from sam_export.runtime.session import Session


def validate(session: Session, batches: Iterable[Any], average: bool = False) -> dict[str, float]:
    """Loss and accuracy over batches, each where the artifact allows it.

    Args:
        session: Whose weights are used.
        batches: As `Session.step` takes them.
        average: Whether the averaged weights are used.

    Returns:
        ``loss``, where the artifact has the program `evaluate_loss`: the mean over the examples of
        a loss that is a mean over its batch. ``accuracy`` (0 to 1), where the one target is an
        integer vector and the output is [batch, classes].

    Raises:
        CommandError: There are no batches.
        SessionError: A batch does not fit the contract.
    """
    contract = session.contract
    inputs = sum(spec.role == "input" for spec in contract.batch)
    has_loss = any(program.name == "evaluate_loss" for program in contract.programs)
    judges = has_class_target(contract)
    loss, right, judged, examples = 0.0, 0, 0, 0
    for batch in batches:
        as_dict = isinstance(batch, Mapping)
        entries = (batch,) if as_dict else tuple(batch)
        tensors = [batch[spec.name] for spec in contract.batch] if as_dict else entries
        count = len(tensors[0])
        examples += count
        if has_loss:
            loss += session.evaluate_loss(*entries, average=average) * count
        if judges:
            given = entries if as_dict else entries[:inputs]
            output = session.evaluate(*given, average=average)
            if output.ndim == 2:
                right += int((output.argmax(axis=1) == np.asarray(tensors[-1])).sum())
                judged += count
    if not examples:
        raise CommandError("The validation data has no batches.")
    values = {"loss": loss / examples} if has_loss else {}
    if judged:
        values["accuracy"] = right / judged
    return values


def has_class_target(contract: StepContract) -> bool:
    """Whether the one target, last in a batch, is an integer vector, and the output one tensor."""
    targets = [spec for spec in contract.batch if spec.role == "target"]
    return (
        targets == [contract.batch[-1]]
        and len(targets[0].shape) == 1
        and np.issubdtype(np.dtype(targets[0].dtype), np.integer)
        and contract.output_tree == "tensor"
    )
