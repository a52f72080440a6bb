"""The settings of a training run beside its checkpoint, so that ``--resume`` continues exactly.

``run.ckpt`` has ``run.ckpt.json``. It holds what does not change during a run; where the run is,
the checkpoint itself knows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sam_export.artifact.state_file import replace_whole, sync
from sam_export.cli.errors import CommandError

DEFAULT_BATCH_SIZE = 32


@dataclass(frozen=True)
class RunSettings:
    """What decides which batch and which learning rate a step of a run gets.

    Attributes:
        epochs: Passes over the data in the whole run.
        batch_size: Examples in a batch.
        seed: Of the order of the examples.
        examples: Number of examples; None where the data is a function.
        lr: Learning rate before the schedule; None takes the artifact's.
        lr_schedule: Text of the schedule.
        rho: Radius of the perturbation; None takes the artifact's.
    """

    epochs: int = 1
    batch_size: int = DEFAULT_BATCH_SIZE
    seed: int = 0
    examples: int | None = None
    lr: float | None = None
    lr_schedule: str = "constant"
    rho: float | None = None


_FIXED = ("batch_size", "seed", "examples")  # another value would be another order of batches


def run_file(checkpoint: Path) -> Path:
    """The file of settings that belongs to a checkpoint."""
    return checkpoint.with_name(checkpoint.name + ".json")


def write_run(checkpoint: Path, settings: RunSettings) -> None:
    """Writes the settings of a run beside its checkpoint, whole or not at all."""

    def write(path: Path) -> None:
        path.write_text(json.dumps(asdict(settings), indent=1) + "\n")
        sync(path)

    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    replace_whole(run_file(checkpoint), write)


def read_run(checkpoint: Path) -> RunSettings | None:
    """The settings of the run that wrote a checkpoint; None when it was not `sam-export train`.

    Raises:
        CommandError: The file is damaged.
    """
    path = run_file(checkpoint)
    try:
        values = json.loads(path.read_bytes())
        if set(values) != {field.name for field in fields(RunSettings)}:
            raise ValueError(f"it has the fields {', '.join(values)}")
        return RunSettings(**values)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise CommandError(
            f"{path} is damaged: {error}. Remove it to resume with settings from the command line."
        ) from error


def merge_runs(checkpoint: Path, old: RunSettings, given: dict[str, float | str]) -> RunSettings:
    """The settings of a run that continues ``old``.

    Args:
        checkpoint: Where ``old`` comes from, for messages.
        old: The settings so far.
        given: Those that the command line names; the others stay.

    Raises:
        CommandError: One that decides the order of the batches is to change.
    """
    for name in _FIXED:
        if name in given and given[name] != getattr(old, name):
            raise CommandError(
                f"{checkpoint} was trained with {name.replace('_', ' ')} {getattr(old, name)}, not "
                f"{given[name]}: the batches would come in another order. Leave it out, or start "
                "a run without --resume."
            )
    return RunSettings(**{**asdict(old), **given})
