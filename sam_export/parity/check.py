"""`check_parity`: is every target's step the eager step?"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sam_export.errors import ParityError
from sam_export.parity.disturb import examples
from sam_export.parity.failures import chosen as chosen_differences
from sam_export.parity.ledger import ledger, versions
from sam_export.parity.oracle import Batch, Oracle
from sam_export.parity.panel import Panel
from sam_export.parity.report import ParityReport, TargetReport
from sam_export.parity.rollout import (
    METRICS,
    Progress,
    Run,
    SessionLike,
    begin,
    run_free,
    run_locked,
)
from sam_export.parity.series import TensorSeries, series_of
from sam_export.parity.tolerances import Mode, Tolerances
from sam_export.parity.verdict import Row, judge_steps, rows_per_step, worst_per_step
from sam_export.step.train_step import TrainStep
from sam_export.tracing.dynamic import Dynamic

DEFAULT_TARGETS = ("torch-compile", "torchscript", "aot-inductor", "onnx")


def check_parity(
    step: TrainStep,
    batches: Sequence[Any],
    targets: Sequence[str] | None = None,
    num_steps: int = 20,
    device: str = "cpu",
    sessions: Mapping[str, SessionLike] | None = None,
    seed: int = 0,
    tolerances: Tolerances | None = None,
    progress: Progress | None = None,
    dynamic: Dynamic = "batch",
    command: str | None = None,
) -> ParityReport:
    """Compares the step of each target with plain eager PyTorch, by name and by change.

    Every target is exported, loaded and run twice through ``num_steps`` steps beside an oracle
    that shares no code with this package: free-running from the start state, and in lock-step,
    where each step starts from eager's state. A target passes when no tensor and no metric of
    either is further from the float64 oracle than a right step can be (`Tolerances`).

    Args:
        step: The eager step; model and optimizer are left as they are.
        batches: Tuples or dicts of tensors or NumPy arrays, of any sizes that the step takes; they
            are cycled where there are fewer than ``num_steps``.
        targets: Names of targets; None: all that there are, or none where ``sessions`` are given.
        num_steps: Steps of each rollout, at least 1.
        device: Where the targets run.
        sessions: Sessions that exist already, by a name for the report. They are put to the start
            of ``step`` and get their state back at the end; their step count goes on.
        seed: Of torch's generators before each step and of the oracle's permutations.
        tolerances: Other numbers than the defaults.
        progress: Called with a phase, the steps done and the steps to do.
        dynamic: Which sizes stay symbolic in the targets, as `capture` takes it: ``"batch"``, None,
            or per input ``{"x": {0: "batch", 1: "time"}}``. The batches may then differ in them.
        command: What the report says for repeating the check; None: the call of this function.

    Returns:
        The report. A target that cannot be built or run is a failed one, not an error.

    Raises:
        ParityError: Nothing can be compared: no batch, no step, no target, or eager itself fails.
        StepConfigError: ``dynamic`` does not fit the batch.
        CaptureError: The step cannot be captured.
    """
    existing = dict(sessions or {})
    chosen = tuple(targets) if targets is not None else () if existing else DEFAULT_TARGETS
    _check_request(batches, num_steps, chosen, existing)
    tol = tolerances or Tolerances()
    tell = progress or (lambda phase, done, total: None)
    with _own_generators(), tempfile.TemporaryDirectory(prefix="sam_export-parity-") as folder:
        panel = Panel(lambda: _oracle(step), batches, seed, tol)
        runs = [Run(name, session) for name, session in existing.items()]
        with _kept_state(runs):
            for run in runs:
                begin(run, panel, reset=True)
            built, failures = _built(step, batches, chosen, device, Path(folder), tell, dynamic)
            for run in built:
                begin(run, panel, reset=False)
            runs += built
            run_free(panel, runs, num_steps, tol, tell)
            run_locked(panel, runs, num_steps, tol, tell)
        facts = {run.name: _facts(run) for run in runs} | {name: {} for name in failures}
        reports = {run.name: _judged(run, panel, tol) for run in runs} | failures
    return ParityReport(
        targets=tuple(reports[name] for name in (*existing, *chosen)),
        dtype=panel.dtype,
        num_steps=num_steps,
        batch_sizes=tuple(examples(panel.batch(index)) for index in range(num_steps)),
        seed=seed,
        optimizer=type(step.optimizer.base_optimizer).__name__,
        semantics=step.semantics.to_dict(),
        versions=versions(),
        device=device,
        threads=torch.get_num_threads(),
        notes=tuple(panel.notes),
        tolerances=tol,
        ledger=ledger(seed, step.seed, device, facts),
        command=command or _call(chosen, existing, num_steps, device, seed, dynamic),
    )


def _call(
    targets: Sequence[str],
    sessions: Mapping[str, SessionLike],
    num_steps: int,
    device: str,
    seed: int,
    dynamic: Dynamic,
) -> str:
    """The Python call that repeats a check, but for what only the caller has."""
    given = {"targets": list(targets), "num_steps": num_steps, "device": device, "seed": seed}
    if dynamic != "batch":
        given["dynamic"] = dynamic
    words = [f"{key}={value!r}" for key, value in given.items()]
    if sessions:
        words.append(f"sessions={{{', '.join(f'{name!r}: ...' for name in sessions)}}}")
    return f"sam_export.check_parity(step, batches, {', '.join(words)})"


def _facts(run: Run) -> dict[str, Any]:
    """What the session says of itself; a given one need not say anything."""
    provider = getattr(run.session, "provider", None)
    found: dict[str, Any] = {} if provider is None else {"provider": str(provider)}
    with run.guarded("reading the session's settings"):
        found |= getattr(run.session, "facts", {})
    return found


def _check_request(
    batches: Sequence[Batch],
    num_steps: int,
    targets: Sequence[str],
    sessions: Mapping[str, SessionLike],
) -> None:
    if not len(batches):
        raise ParityError(
            "check_parity was given no batch; pass at least one, as the step takes it."
        )
    if num_steps < 1:
        raise ParityError(f"num_steps={num_steps}: at least one step is needed to compare.")
    names = [*sessions, *targets]
    if not names:
        raise ParityError(
            "check_parity was given no target and no session, so there is nothing to compare; "
            f"pass targets={list(DEFAULT_TARGETS)}."
        )
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ParityError(f"Given twice: {', '.join(double)}. Each name stands for one row.")
    for index, batch in enumerate(batches):
        if not isinstance(batch, (tuple, list, Mapping)):
            raise ParityError(
                f"Batch {index} is a {type(batch).__name__}; expected a tuple or a dict of tensors."
            )


def _oracle(step: TrainStep) -> Oracle:
    semantics = step.semantics
    return Oracle(
        step.model,
        step.loss_fn,
        step.optimizer.base_optimizer,
        num_targets=step.num_targets,
        running_stats=semantics.running_stats,
        randomness=semantics.randomness,
        generator=semantics.generator,
        seed=step.seed,
        step_count=step.step_count,
        on_nonfinite=semantics.on_nonfinite,
        decay_in_ascent=semantics.decay_in_ascent,
    )


def _built(
    step: TrainStep,
    batches: Sequence[Batch],
    targets: Sequence[str],
    device: str,
    folder: Path,
    tell: Progress,
    dynamic: Dynamic,
) -> tuple[list[Run], dict[str, TargetReport]]:
    """Exports the step to every target and loads it from there; failures become reports."""
    if not targets:
        return [], {}
    from sam_export.api import device_to_build_for, export, load
    from sam_export.tracing.capture import capture

    tell("capture", 0, 1)
    captured = capture(step, _example(step, batches[0]), dynamic=dynamic)
    tell("capture", 1, 1)
    runs, failures = [], {}
    for index, target in enumerate(targets):
        tell(f"build {target}", index, len(targets))
        begun = time.perf_counter()
        try:
            built_for = device_to_build_for(target, device)
            export(captured, folder / target, target=target, device=built_for)
            session = load(folder / target, device=device)
        except Exception as error:
            text = f"build: {type(error).__name__}: {error}"
            seconds = time.perf_counter() - begun
            failures[target] = TargetReport(target, None, (), (), (), text, seconds)
        else:
            runs.append(Run(target, session, seconds=time.perf_counter() - begun))
        tell(f"build {target}", index + 1, len(targets))
    return runs, failures


def _example(step: TrainStep, batch: Batch) -> Any:
    device = next(step.model.parameters()).device

    def tensor(value: Any) -> torch.Tensor:
        whole = value if isinstance(value, torch.Tensor) else torch.tensor(np.asarray(value))
        return whole.to(device)

    if isinstance(batch, Mapping):
        return {key: tensor(value) for key, value in batch.items()}
    return tuple(tensor(value) for value in batch)


def _judged(run: Run, panel: Panel, tol: Tolerances) -> TargetReport:
    roles = dict.fromkeys(panel.parameters, "parameter")
    roles |= dict.fromkeys((*METRICS, "finite"), "metric")
    rows = [
        Row(name, roles.get(name, "state"), "start", 0, 0.0, math.inf, 0.0, math.inf, 0.0, "FAIL",
            note=note)
        for name, note in run.start_problems.items()
    ]  # fmt: skip
    worst: dict[Mode, tuple[float, ...]] = {}
    series: list[TensorSeries] = []
    modes: tuple[tuple[Mode, Any], ...] = (("lock-step", run.locked), ("free-running", run.free))
    for mode, steps in modes:
        tipped = run.tipped if mode == "lock-step" else {}
        judged = judge_steps(steps, roles, mode, panel.dtype, tol, tipped)
        noise = {row.name for row in judged if row.verdict == "noise"}
        worst[mode] = worst_per_step(steps, noise, (*METRICS, "finite"))
        every = rows_per_step(steps, roles, mode, panel.dtype, tol)
        series += series_of(every, len(steps))
        rows += judged
    provider = getattr(run.session, "provider", None)
    failed = TargetReport.worst([row for row in rows if row.verdict == "FAIL"])
    return TargetReport(
        name=run.name,
        provider=None if provider is None else str(provider),
        rows=tuple(rows),
        lock_step=worst["lock-step"],
        free_running=worst["free-running"],
        error=run.error,
        seconds=run.seconds,
        known_rounding=max(getattr(run.session, "known_rounding", {}).values(), default=0.0),
        series=tuple(series),
        differences=chosen_differences(run.described, failed, series, panel.parameters),
    )


@contextmanager
def _own_generators() -> Iterator[None]:
    """Leaves torch's generators as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


@contextmanager
def _kept_state(runs: Sequence[Run]) -> Iterator[None]:
    """Gives the user's sessions their state back."""
    given = list(runs)
    before = {run.name: dict(run.session.state) for run in given}
    try:
        yield
    finally:
        for run in given:
            with run.guarded("putting the state back"):
                run.session.set_state(before[run.name])
