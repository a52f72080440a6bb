"""`SelfTestReport`: which faults the parity check found, and where, as a table and as JSON."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sam_export.artifact.state_file import replace_whole
from sam_export.errors import ParityError

FORMAT = 1
"""Number of the JSON schema that `SelfTestReport.to_dict` describes."""

Result = Literal["caught", "slipped", "passed", "false alarm", "refused", "error"]

_WIDTH = 100


@dataclass(frozen=True)
class Outcome:
    """What the check made of one fault, in one model and target.

    Attributes:
        mutant: Name of the fault, or of the right step.
        model: ``conv`` or ``mlp``.
        target: The target.
        result: ``caught`` or ``slipped``; for the right step ``passed`` or ``false alarm``;
            ``refused`` (the target cannot hold the step) or ``error`` (it could not be run).
        tensor: The tensor or metric that is furthest from what is allowed.
        role: ``parameter``, ``buffer``, ``slot``, ``state`` or ``metric``.
        mode: ``start``, ``lock-step`` or ``free-running``.
        step: The step of that, from 1.
        margin: Its error in units of what is allowed; over 1 is a failure.
        failed: How many comparisons failed.
        note: Why it could not be compared, refused, or run.
    """

    mutant: str
    model: str
    target: str
    result: Result
    tensor: str = ""
    role: str = ""
    mode: str = ""
    step: int = 0
    margin: float = 0.0
    failed: int = 0
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the check did what it is for."""
        return self.result in ("caught", "passed")


@dataclass(frozen=True)
class SelfTestReport:
    """The outcome for every fault, model and target.

    Attributes:
        targets: The targets, in the order in which they were asked for.
        num_steps: Steps of each rollout.
        outcomes: One per fault, model in which it is one, and target; right steps first.
    """

    targets: tuple[str, ...]
    num_steps: int
    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        """Whether every fault was caught, and every right step passed, in every target."""
        return bool(self.outcomes) and all(outcome.ok for outcome in self.outcomes)

    @property
    def slipped(self) -> tuple[Outcome, ...]:
        """Wrong steps that passed and right ones that failed."""
        return tuple(o for o in self.outcomes if o.result in ("slipped", "false alarm"))

    @property
    def not_run(self) -> tuple[Outcome, ...]:
        """What could not be built or run, so that nothing is known of it."""
        return tuple(o for o in self.outcomes if o.result in ("refused", "error"))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a margin that is not finite is null.

        Keys: ``format`` (1), ``ok``, ``targets``, ``num_steps`` and ``outcomes``, a list of objects
        with the fields of `Outcome`.
        """
        outcomes = []
        for outcome in self.outcomes:
            values = asdict(outcome)
            if not math.isfinite(outcome.margin):
                values["margin"] = None
            outcomes.append(values)
        return {
            "format": FORMAT,
            "ok": self.ok,
            "targets": list(self.targets),
            "num_steps": self.num_steps,
            "outcomes": outcomes,
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_dict` to a file, whole or not at all.

        Raises:
            ParityError: The file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        try:
            replace_whole(Path(path), lambda partial: _write(partial, text))
        except OSError as error:
            raise ParityError(
                f"The report cannot be written to {os.fspath(path)}: {error.strerror or error}."
            ) from error

    def __str__(self) -> str:
        """A table of at most 100 columns: a line for each fault and target."""
        names = list(dict.fromkeys(outcome.mutant for outcome in self.outcomes))
        lines = [_columns(("fault", "target", "result", "worst tensor", "mode", "step", "margin"))]
        for name in names:
            for target in self.targets:
                group = [o for o in self.outcomes if (o.mutant, o.target) == (name, target)]
                lines += [_line(_least(group))] if group else []
        lines += [line for outcome in self._explained() for line in outcome]
        counts = Counter(outcome.result for outcome in self.outcomes)
        said = ", ".join(f"{count} {result}" for result, count in counts.items())
        lines += textwrap.wrap(
            f"{'OK' if self.ok else 'FAILED'}: {len(names) - 1} faults and the right step in "
            f"{len(self.targets)} targets, {self.num_steps} steps: {said}. Margin: error in units "
            "of what is allowed, in the model in which it is smaller.",
            _WIDTH,
        )
        return "\n".join(lines)

    def _explained(self) -> list[list[str]]:
        """The reasons of what was refused or could not be run, each once."""
        found: dict[tuple[str, str, str], int] = {}
        for outcome in self.not_run:
            key = (outcome.target, outcome.model, outcome.note)
            found[key] = found.get(key, 0) + 1
        return [
            textwrap.wrap(
                f"! {target}, model {model}, {count} rows: {note}", _WIDTH, subsequent_indent="  "
            )
            for (target, model, note), count in found.items()
        ]


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _least(group: Sequence[Outcome]) -> Outcome:
    """The outcome that says least for the check: not ok before ok, small margins first."""
    right = group[0].result in ("passed", "false alarm")
    return min(group, key=lambda o: (o.ok, -o.margin if right else o.margin))


def _line(outcome: Outcome) -> str:
    tensor = outcome.tensor if len(outcome.tensor) <= 27 else "…" + outcome.tensor[-26:]
    mode = outcome.mode.replace("free-running", "free").replace("lock-step", "lock")
    if not outcome.tensor:
        return _columns((outcome.mutant, outcome.target, outcome.result, "", "", "", ""))
    margin = f"{outcome.margin:.1e}" if math.isfinite(outcome.margin) else "inf"
    result = outcome.result.upper() if not outcome.ok else outcome.result
    step = str(outcome.step)
    return _columns((outcome.mutant, outcome.target, result, tensor, mode, step, margin))


def _columns(cells: tuple[str, ...]) -> str:
    fault, target, result, tensor, mode, step, margin = cells
    return (
        f"{fault:<27} {target:<13} {result:<11} {tensor:<27} {mode:<5} {step:>4} {margin:>7}"
    ).rstrip()
