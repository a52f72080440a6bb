"""`ParityReport`: what the check found, as a table for people and as JSON for machines."""

from __future__ import annotations

import json
import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sam_export.parity.difference import Difference
from sam_export.parity.laws import Law
from sam_export.parity.reference import ReferenceResult
from sam_export.parity.series import TensorSeries, growth
from sam_export.parity.text_file import write_text
from sam_export.parity.tolerances import Tolerances, reasons
from sam_export.parity.verdict import Row

FORMAT = 2
"""Number of the JSON schema, `docs/parity_report.schema.json`."""

_HEADER = ("tensor", "mode", "step", "change", "error", "relative", "floor", "bound", "verdict")
_WIDTH = 100
_SHOWN = 3
_SHOWN_FAILED = 8
_FEW_TARGETS = 2
"""Up to so many targets the table shows its usual number of rows of each; beyond it, fewer."""
_NUMBERS = re.compile(r"\[\n[-+.\w\s,]+\]")
"""A list of numbers over many lines, which a file has on one; no string has a line end in it."""
_LINES = 2
"""Lines that a list of names may take in the table."""


@dataclass(frozen=True)
class TargetReport:
    """What one target's session did.

    Attributes:
        name: The target, or the name that the session was given.
        provider: What really ran the graph; None where the session does not say.
        rows: One verdict per tensor and metric and mode.
        lock_step: Largest relative error of each lock-step step, without noise tensors.
        free_running: The same of each free-running step.
        error: Why the target could not be built or run to the end; None where it could.
        seconds: Time for building the target and for running its steps.
        known_rounding: Largest part of a change by which the target's runtime is known to be off;
            the bounds of those tensors allow for it.
        laws: What came of the laws that need no oracle of the same algorithm.
        resumed_after: Free-running: steps after which it went on from a checkpoint in a new
            process; 0: it could not.
        series: Error of each tensor and metric at each step of each mode.
        differences: What the tensors that differ look like, the first one first; see
            `failures.chosen` for which ones.
    """

    name: str
    provider: str | None
    rows: tuple[Row, ...]
    lock_step: tuple[float, ...]
    free_running: tuple[float, ...]
    error: str | None
    seconds: float
    known_rounding: float = 0.0
    laws: tuple[Law, ...] = ()
    resumed_after: int = 0
    series: tuple[TensorSeries, ...] = ()
    differences: tuple[Difference, ...] = ()

    @property
    def first_difference(self) -> Difference | None:
        """Where the step goes wrong first: in lock-step if it does there, by step, then stage."""
        return self.differences[0] if self.differences else None

    @property
    def growth(self) -> float | None:
        """Slope of log10 of `free_running` over the steps, in decades per step."""
        return growth(self.free_running)

    @property
    def ok(self) -> bool:
        """Whether the target ran, nothing differs, and no law is broken."""
        return self.error is None and bool(self.rows) and not self.failed and not self.broken

    @property
    def broken(self) -> tuple[Law, ...]:
        """The laws that it does not obey."""
        return tuple(law for law in self.laws if law.verdict == "FAIL")

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that differ, worst first."""
        return self.worst([row for row in self.rows if row.verdict == "FAIL"])

    @property
    def noise(self) -> tuple[str, ...]:
        """Names of tensors whose change is rounding noise in eager itself, in either mode."""
        return tuple(dict.fromkeys(row.name for row in self.rows if row.verdict == "noise"))

    @staticmethod
    def worst(rows: list[Row]) -> tuple[Row, ...]:
        """Rows by error in units of what is allowed, largest first."""
        return tuple(sorted(rows, key=lambda row: (-row.badness, -row.relative, row.name)))


@dataclass(frozen=True)
class ParityReport:
    """Verdict on every target, with all that is needed to believe and to repeat it.

    Attributes:
        targets: One report per target, in the order in which they were asked for.
        dtype: NumPy's name of the model's dtype.
        num_steps: Steps of each mode.
        batch_sizes: Examples in each step's batch.
        seed: Of torch's generators, the permutations and the nudges.
        optimizer: Class of the base optimizer.
        semantics: The fields of `Semantics`.
        versions: Package to version, and Python's.
        device: Device of the sessions, as it was asked for.
        threads: torch's thread count, for the oracle.
        notes: Where the check had to judge otherwise than usual, and why.
        tolerances: The numbers that decided.
        laws: Those of eager itself: finite differences of its gradients.
        reference: How the user's own loop compares with the step; None where none was given.
        interrupted: Whether the check was stopped in the middle.
        ledger: All that the numbers may depend on; see `ledger.ledger`.
        command: What to run to repeat the check.
    """

    targets: tuple[TargetReport, ...]
    dtype: str
    num_steps: int
    batch_sizes: tuple[int, ...]
    seed: int
    optimizer: str
    semantics: Mapping[str, Any]
    versions: Mapping[str, str]
    device: str
    threads: int
    notes: tuple[str, ...]
    tolerances: Tolerances
    laws: tuple[Law, ...] = ()
    reference: ReferenceResult | None = None
    interrupted: bool = False
    ledger: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""

    @property
    def ok(self) -> bool:
        """Whether every target passed, eager's gradients are right and the user's loop is equal."""
        right = all(law.verdict != "FAIL" for law in self.laws)
        same = self.reference is None or self.reference.equal
        whole = bool(self.targets) and not self.interrupted
        return whole and right and same and all(target.ok for target in self.targets)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a number that is not finite is null.

        `docs/parity_report.schema.json` describes them. ``format`` is `FORMAT`; the other keys are
        ``ok``, the fields of this class, and ``reasons`` (field of `Tolerances` to where its number
        comes from). ``targets`` has the fields of `TargetReport`, ``ok``, ``noise`` and ``growth``.
        """
        values = {
            "format": FORMAT,
            "ok": self.ok,
            **asdict(self),
            "targets": [
                {
                    **asdict(target),
                    "ok": target.ok,
                    "noise": list(target.noise),
                    "growth": target.growth,
                }
                for target in self.targets
            ],
            "reasons": reasons(),
        }
        plain = _plain(values)
        assert isinstance(plain, dict)
        return plain

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_dict` to a file, whole or not at all.

        Raises:
            ParityError: The file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        text = _NUMBERS.sub(lambda found: " ".join(found.group().split()), text)
        write_text(path, text)

    def __str__(self) -> str:
        sizes = "/".join(str(size) for size in dict.fromkeys(self.batch_sizes))
        lines = [
            f"parity with eager SAM + {self.optimizer}: {'OK' if self.ok else 'FAILED'}",
            f"{self.dtype}, {self.num_steps} steps, batches of {sizes}, seed {self.seed}, "
            f"device {self.device}, torch {self.versions.get('torch', '?')}",
        ]
        lines += [f"FAIL: {law.name}: {law.detail}" for law in self.laws if law.verdict == "FAIL"]
        if self.reference is not None:
            lines += _wrapped(str(self.reference), "your loop: ")
        few = len(self.targets) <= _FEW_TARGETS
        header = next((target for target in self.targets if target.rows), None)
        for target in self.targets:
            lines += ["", *_target_lines(target, few, few or target is header)]
        lines += ["", *self._legend()]
        return "\n".join(lines)

    def _legend(self) -> list[str]:
        tol = self.tolerances
        if self.dtype == "float64":
            rule = f"passes: error <= {tol.exact:g} of the change, or {tol.factor:g} floors"
        else:
            lock = tol.relative(self.dtype, "lock-step")
            rule = (
                f"passes: error <= {tol.factor:g} floors, or <= {lock:.1e} (lock-step: each step "
                f"from eager's state) or {tol.drift:g} (free-running) of the change"
            )
        judge = "the oracle's own spread" if self.dtype == "float64" else "eager's own distance"
        text = (
            f"{rule}. Error: distance of the target's change from the float64 oracle's; floor: "
            f"{judge} from it, also with the sums of a plain loop and under {tol.permutations} "
            f"batch permutations; noise: the change is below {tol.floors:g} floors."
        )
        return [
            *_wrapped(text, ""),
            *(line for note in self.notes for line in _wrapped(note, "! ")),
        ]


def _target_lines(target: TargetReport, few: bool, header: bool) -> list[str]:
    where = f" ({target.provider})" if target.provider else ""
    verdict = "OK" if target.ok else "FAILED"
    lines = [f"{target.name}{where}: {verdict}, {target.seconds:.1f} s"]
    if target.error is not None:
        lines += _wrapped(target.error, "  error: ")
    if not target.rows:
        return lines
    if target.first_difference is not None:
        lines += _difference_lines(target.first_difference)
    if header:
        lines.append(_columns(_HEADER))
    failed = target.failed
    shown = list(failed[: _SHOWN_FAILED if few else _SHOWN])
    for mode in ("lock-step", "free-running"):
        rows = [row for row in target.rows if row.mode == mode and row.verdict != "FAIL"]
        shown += target.worst(rows)[: 0 if failed else _SHOWN if few else 1]
    lines += [_columns(_cells(row)) for row in shown]
    lines += [f"  {row.name}: {row.note}" for row in shown if row.note]
    counts = {v: sum(row.verdict == v for row in target.rows) for v in ("ok", "noise", "FAIL")}
    lines.append(
        f"  {counts['ok']} ok, {counts['noise']} noise, {counts['FAIL']} FAIL of "
        f"{len(target.rows)} comparisons ({len(shown)} shown, worst first)"
    )
    if target.laws:
        held = [law for law in target.laws if law.verdict == "ok"]
        lines.append(
            f"  laws: {len(held)} hold, {len(target.broken)} broken, "
            f"{len(target.laws) - len(held) - len(target.broken)} do not apply"
        )
        for law in target.broken:
            lines += _wrapped(f"{law.name}: {law.detail}", "  broken: ")
    if target.known_rounding:
        text = f"up to {target.known_rounding:.1e} of a change, see its manifest"
        lines += _wrapped(text, "  allowed for the runtime's own rounding: ")
    if target.noise:
        lines += _clipped(target.noise, "  noise: ")
    tipped = {row.name: row.tipped for row in target.rows if row.tipped}
    if tipped:
        names = tuple(f"{name} ({count})" for name, count in tipped.items())
        lines += _clipped(names, "  gone when moved a few ulps (steps): ")
    return lines


def _difference_lines(first: Difference) -> list[str]:
    where = f"{first.mode} step {first.step}, {first.stage}" if first.step else "start state"
    lines = _wrapped(f"{where}: {first.name}", "  differs first: ")
    if first.index is None or first.found is None or first.expected is None:
        return lines + _wrapped(first.note, "    ")
    at = f"worst element {list(first.index)}" if first.index else "value"
    text = f"{at}: {first.found:.6g}, expected {first.expected:.6g}"
    if first.before is not None:
        text += f", before {first.before:.6g}"
    if first.not_finite:
        text += f"; {first.not_finite} of {first.elements} elements not finite"
    elif first.relative is not None:
        unit = "change" if first.stage in ("slots", "parameters", "buffers") else "value"
        text += f"; error {first.relative:.1e} of the {unit}"
    if first.elements > 1 and first.cosine is not None and first.length is not None:
        text += f"; cosine {first.cosine:.6f}, length {first.length:.4g} times eager's"
    if first.ulp_max is not None and first.ulp_median is not None:
        median = f", {first.ulp_median:.4g} median" if first.elements > 1 else ""
        text += f"; ulps: {first.ulp_max:.4g} at most{median}"
    if first.elements > 1:
        text += f"; {first.over} of {first.elements} elements over their share of the bound"
    return lines + _wrapped(text, "    ")


def _clipped(names: Sequence[str], first: str) -> list[str]:
    """Names in a few lines; how many are left out is said."""
    lines = _wrapped(", ".join(names), first)
    shown = len(names)
    while len(lines) > _LINES and shown > 1:
        shown -= 1
        text = f"{', '.join(names[:shown])} and {len(names) - shown} more"
        lines = _wrapped(text, first)
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    name = row.name if len(row.name) <= 30 else "…" + row.name[-29:]
    mode = row.mode.replace("free-running", "free").replace("lock-step", "lock")
    numbers = (row.change, row.error, row.relative, row.floor, row.bound)
    return (name, mode, str(row.step), *(f"{value:.1e}" for value in numbers), row.verdict)


def _columns(cells: tuple[str, ...]) -> str:
    name, mode, step, *numbers, verdict = cells
    return (
        f"  {name:<30} {mode:<5} {step:>4} "
        + " ".join(f"{number:>8}" for number in numbers)
        + f"  {verdict}"
    )


def _wrapped(text: str, first: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * min(len(first), 9),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
