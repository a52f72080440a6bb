"""Drives sessions through N steps beside the oracle, and keeps the distances, not the states."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sam_export.artifact.contract import STAGE
from sam_export.errors import ParityError, SamExportError
from sam_export.parity.compare import (
    Sample,
    State,
    flag_sample,
    measure,
    metric_sample,
    mismatches,
    with_errors,
)
from sam_export.parity.failures import Described, describe_start, describe_step
from sam_export.parity.oracle_batch import Batch
from sam_export.parity.panel import Panel, Round, Stepped
from sam_export.parity.tolerances import Tolerances
from sam_export.parity.verdict import is_over

Progress = Callable[[str, int, int], None]
"""Called with a phase, the steps done and the steps to do."""


class SessionLike(Protocol):
    """What a rollout needs of a session; `Session` has it."""

    @property
    def state(self) -> Mapping[str, NDArray[Any]]:
        """Copies of all state, by name."""

    def set_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Makes ``state``, which is complete, the current one."""

    def step(self, *batch: Any, **hyper: Any) -> Any:
        """Runs one step; the result has the fields of `StepResult`."""


@dataclass
class Run:
    """One session under test and what has been seen of it so far.

    Attributes:
        name: Target, or the name that the user gave.
        session: The session.
        free: Samples of each free-running step.
        locked: Samples of each lock-step step.
        tipped: Tensor to number of steps in which a retest cleared a difference.
        start_problems: Tensor to what is wrong with the state it began with.
        error: Why the run ended early; None while it is well.
        confirmed: Whether a difference has survived its retests; no more are needed then.
        initial: The state that it began with.
        seconds: Time that the session took so far.
        artifact: Folder of its artifact, where there is one.
        resumed_after: Steps after which it went on from a checkpoint in a new process; 0: it did
            not.
        described: What tensors that may differ look like.
    """

    name: str
    session: SessionLike
    free: list[dict[str, Sample]] = field(default_factory=list)
    locked: list[dict[str, Sample]] = field(default_factory=list)
    tipped: dict[str, int] = field(default_factory=dict)
    start_problems: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    confirmed: bool = False
    initial: State = field(default_factory=dict)
    seconds: float = 0.0
    artifact: Path | None = None
    resumed_after: int = 0
    described: Described = field(default_factory=dict)

    @contextmanager
    def guarded(self, doing: str) -> Iterator[None]:
        """Turns an exception into a failed run, so that the other targets go on."""
        begun = time.perf_counter()
        try:
            yield
        except ParityError:
            raise  # says that the check itself cannot be carried out
        except Exception as error:
            self.error = self.error or f"{doing}: {type(error).__name__}: {error}"
        finally:
            self.seconds += time.perf_counter() - begun


def begin(run: Run, panel: Panel, reset: bool) -> None:
    """Reads the start state of a session and checks that it is eager's, bit for bit.

    Args:
        run: The session's run.
        panel: The oracle runs.
        reset: Whether to put the session to eager's start state first.
    """
    with run.guarded("start"):
        run.initial = dict(run.session.state)
        if reset:
            run.session.set_state(_fitted(panel.start, run.initial))
            run.initial = dict(run.session.state)
        problems = mismatches(panel.start, _compared(run, run.initial, panel.start), run.initial)
        for name, value in panel.start.items():
            if name not in problems and not np.array_equal(run.initial[name], value):
                problems[name] = "does not start from eager's value"
        run.start_problems = problems
        run.described |= describe_start(panel.start, run.initial, problems, panel.parameters)


def run_free(
    panel: Panel, runs: list[Run], steps: int, tol: Tolerances, progress: Progress
) -> None:
    """All steps from the start state, each contestant on its own.

    In the middle, a session that can goes on from a checkpoint in a new process: what the file does
    not hold is a difference from there on.
    """
    untrained = panel.parameters
    for step in range(steps):
        this = panel.free(step)
        untrained &= this.untrained  # what got a gradient in any step has drifted since
        this = replace(this, untrained=untrained)
        samples = _measured(panel, this, step + 1, tol)
        for run in runs:
            if run.error is None:
                with run.guarded(f"free-running step {step + 1}"):
                    found = _stepped(panel, run, panel.batch(step), step, this)
                    compared = _compare(panel, run, this, samples, found, step + 1)
                    run.free.append(compared)
                    run.described |= describe_step(
                        "free-running", step + 1, compared, this, found,
                        panel.parameters, panel.dtype, tol,
                    )  # fmt: skip
                    if step + 1 == steps // 2:
                        _resume(run, step + 1)
        progress("free-running", step + 1, steps)


def _resume(run: Run, steps: int) -> None:
    resume = getattr(run.session, "resume", None)
    if resume is None:
        return
    before = run.session.state
    with tempfile.TemporaryDirectory(prefix="sam_export-parity-") as folder:
        resume(Path(folder, "checkpoint"))
    after = run.session.state
    changed = [name for name in before if not _same_bits(before[name], after[name])]
    if changed:
        raise ValueError(
            f"{', '.join(changed[:3])} came back changed from a checkpoint after step {steps}"
        )
    run.resumed_after = steps


def _same_bits(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def run_locked(
    panel: Panel, runs: list[Run], steps: int, tol: Tolerances, progress: Progress
) -> None:
    """Each step from the state that eager had before it; differences are retested."""
    state: State = panel.start
    carried = {run.name: run.initial for run in runs}
    for step in range(steps):
        batch = panel.batch(step)
        again = _Again(panel, state, batch, step, tol)
        this = panel.locked(state, step)
        samples = _measured(panel, this, 1, tol)
        for run in runs:
            if run.error is not None:
                continue
            with run.guarded(f"lock-step step {step + 1}"):
                # Counters, and slots that eager has not made yet, go on from where they are.
                full = _fitted(state, carried[run.name])
                run.session.set_state(full)
                found = _stepped(panel, run, batch, step, this)
                carried[run.name] = _kept(found.state)
                compared = _compare(panel, run, this, samples, found, 1)
                run.locked.append(compared)
                run.described |= describe_step(
                    "lock-step", step + 1, compared, this, found,
                    panel.parameters, panel.dtype, tol,
                )  # fmt: skip
                if this.eager.finite and not run.confirmed:
                    _retest(panel, run, full, again, tol)
        state = _kept(this.eager.state)
        progress("lock-step", step + 1, steps)


class _Again:
    """The oracle runs of one lock-step step from moved weights and inputs, made when asked for."""

    def __init__(
        self, panel: Panel, state: State, batch: Batch, step: int, tol: Tolerances
    ) -> None:
        self.panel, self.step = panel, step
        self._origin = (state, batch, panel.nudge)
        self._made: list[tuple[State, Batch, Round]] = []

    def attempt(self, index: int) -> tuple[State, Batch, Round]:
        """Start state, batch and oracle runs of one attempt; all sessions share them."""
        while len(self._made) <= index:
            state, batch, ulps = self._origin
            moved, other = self.panel.nudged(state, batch, self.step, len(self._made), ulps)
            self._made.append((moved, other, self.panel.lock(moved, self.step, other)))
        return self._made[index]


def _retest(panel: Panel, run: Run, full: State, again: _Again, tol: Tolerances) -> None:
    """Clears what goes away when weights and inputs move a few ulps; confirms what does not."""
    latest = run.locked[-1]
    earlier = {n: [s[n].noise for s in run.locked[:-1] if n in s] for n in latest}

    def over(samples: Mapping[str, Sample], names: set[str]) -> set[str]:
        return {n for n in names if is_over(samples[n], earlier[n], panel.dtype, tol)}

    suspects = over(latest, set(latest))
    if any(latest[n].exact or math.isinf(latest[n].error) for n in suspects):
        run.confirmed = True
        return
    for attempt in range(tol.retests):
        if not suspects:
            return
        moved, batch, this = again.attempt(attempt)
        if not this.eager.finite:
            continue
        run.session.set_state(_fitted(moved, full))
        found = _stepped(panel, run, batch, again.step, this)
        samples = _compare(panel, run, this, _measured(panel, this, 1, tol), found, 1)
        still = over(samples, suspects)
        for name in suspects - still:
            latest[name] = samples[name]
            run.described.pop((name, "lock-step", again.step + 1), None)
            run.tipped[name] = run.tipped.get(name, 0) + 1
        suspects = still
    run.confirmed = bool(suspects)


# -- one step -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """One step of a session from a given state: its metrics, and its samples where asked for."""

    metrics: dict[str, float]
    samples: dict[str, Sample]


def compared_from(
    run: Run,
    panel: Panel,
    state: State,
    batch: Batch,
    hyper: Mapping[str, Any],
    this: Round | None = None,
) -> Compared:
    """One step of a session from ``state``, and its distances from the oracle runs ``this``.

    Args:
        run: The session.
        panel: The oracle runs.
        state: To start from.
        batch: The batch.
        hyper: Keywords of the step.
        this: What to compare with; None: only metrics are wanted.
    """
    run.session.set_state(_fitted(state, run.initial))
    found = _stepped(panel, run, batch, 0, this, hyper)
    samples: dict[str, Sample] = {}
    if this is not None:
        measured = _measured(panel, this, 1, panel.tolerances)
        samples = _compare(panel, run, this, measured, found, 1)
    return Compared(found.metrics, samples)


def _measured(panel: Panel, this: Round, steps: int, tol: Tolerances) -> dict[str, Sample]:
    start = this.eager.start
    samples = measure(
        start,
        this.eager.state,
        this.judge.state,
        [(run.start, run.state) for run in this.runs],
        steps,
        tol,
        untrained=this.untrained | panel.scaler,
        buffers=panel.buffers,
        wide=None if this.wide is None else (this.wide.start, this.wide.state),
    )
    if not this.eager.finite and steps == 1:
        # One step that must change nothing: no rounding is allowed for.
        samples = {name: replace(sample, exact=True) for name, sample in samples.items()}
    return samples


def _stepped(
    panel: Panel,
    run: Run,
    batch: Batch,
    step: int,
    this: Round | None,
    hyper: Mapping[str, Any] = MappingProxyType({}),
) -> Stepped:
    panel.seed_generators(step)
    arguments = (batch,) if isinstance(batch, Mapping) else tuple(batch)
    finite = this is None or this.eager.finite
    try:
        result = run.session.step(*arguments, **hyper)
    except SamExportError:
        if finite or panel.on_nonfinite != "raise":
            raise
        return Stepped({}, False, dict(run.session.state), run.initial)
    if not finite and panel.on_nonfinite == "raise":
        raise ValueError("the step is not finite and semantics say to raise, but no error came")
    shown = {name: getattr(result, name) for name in panel.metrics}
    metrics = {name: math.nan if v is None else float(v) for name, v in shown.items()}
    state = dict(run.session.state)
    if panel.stages and bool(result.finite):
        state |= {STAGE + name: np.asarray(value) for name, value in result.stages.items()}
    return Stepped(metrics, bool(result.finite), state, run.initial)


def _compare(
    panel: Panel,
    run: Run,
    this: Round,
    samples: Mapping[str, Sample],
    found: Stepped,
    steps: int,
) -> dict[str, Sample]:
    eager = this.eager.state
    state = _compared(run, found.state, eager)
    problems = mismatches(eager, state, run.initial)
    known = getattr(run.session, "known_rounding", {})
    result = with_errors(samples, problems, this.judge.state, eager, state, known)
    result["finite"] = flag_sample(this.eager.finite, found.finite)
    if this.eager.finite and found.finite:
        for name in panel.metrics:
            result[name] = metric_sample(
                this.judge.metrics[name],
                [each.metrics[name] for each in this.runs],
                found.metrics[name],
                panel.dtype,
                steps,
                None if this.wide is None else this.wide.metrics[name],
            )
    return result


def _compared(run: Run, state: State, eager: State) -> State:
    """Without what only the graph has: a seed and a step number that only evaluation uses."""
    contract = getattr(run.session, "contract", None)
    own = (
        {spec.name for spec in contract.state if spec.role in ("counter", "rng")}
        if contract
        else ()
    )
    return {name: value for name, value in state.items() if name not in own or name in eager}


def _kept(state: State) -> State:
    """Without what is of one step only."""
    return {name: value for name, value in state.items() if not name.startswith(STAGE)}


def _fitted(state: State, full: State) -> dict[str, NDArray[Any]]:
    """``full`` with the entries of ``state``, scalar slots in the dtype that the session has."""
    merged = dict(full)
    for name, value in state.items():
        is_scalar_slot = name.startswith("slot.") and name in full and value.size == 1
        merged[name] = value.astype(full[name].dtype) if is_scalar_slot else value
    return merged
