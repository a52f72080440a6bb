"""The metrics of a training run as JSON lines, one per step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from sam_export.artifact.state_file import replace_whole
from sam_export.cli.errors import CommandError


class MetricsLog:
    """A file with one line per step: step, epoch, losses, gradient norm, lr, rho, finite.

    Args:
        path: The file.
        step_count: Steps that were run before. Lines up to this step are kept, so that a run that
            goes back to a checkpoint does not leave lines of steps that it takes again.

    Raises:
        CommandError: The file cannot be written, or holds something else.
    """

    def __init__(self, path: Path, step_count: int) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _lines_up_to(path, step_count) if step_count else []
            replace_whole(path, lambda partial: _write(partial, kept))
            self._file: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise CommandError(f"Cannot write the log {path}: {error}.") from error

    def write(
        self,
        step: int,
        epoch: int,
        metrics: Mapping[str, float],
        hyper: Mapping[str, Sequence[float]],
        finite: bool,
    ) -> None:
        """Adds the line of one step.

        Args:
            step: Number of the step, from 1.
            epoch: Number of the epoch, from 1.
            metrics: Name to value; one that is not finite becomes null, since JSON has no NaN.
            hyper: Name to one value per parameter group.
            finite: Whether the step was finite.
        """
        values: dict[str, Any] = {"step": step, "epoch": epoch}
        for name, value in metrics.items():
            values[name] = value if math.isfinite(value) else None
        for name, numbers in hyper.items():
            values[name] = numbers[0] if len(numbers) == 1 else list(numbers)
        self._file.write(json.dumps({**values, "finite": finite}) + "\n")

    def flush(self) -> None:
        """Hands what was written to the operating system."""
        self._file.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _lines_up_to(path: Path, step_count: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):  # a crash cut it off
            break
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise CommandError(
                f"Line {number} of {path} is not a line of a training log; choose another --log."
            ) from error
        if step <= step_count:
            kept.append(line)
    return kept


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(lines), encoding="utf-8")
