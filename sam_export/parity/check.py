"""`check_parity`: is every target's step the eager step?"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sam_export.artifact.contract import CLIPPED_METRIC, SCALED_METRIC, STAGE
from sam_export.errors import ParityError
from sam_export.parity.disturb import examples
from sam_export.parity.failures import chosen as chosen_differences
from sam_export.parity.laws import Law, laws_of_eager, laws_of_target
from sam_export.parity.ledger import ledger, versions
from sam_export.parity.oracle_batch import Batch
from sam_export.parity.panel import METRICS, Panel
from sam_export.parity.reference import Reference, ReferenceResult, compare_reference
from sam_export.parity.report import ParityReport, TargetReport
from sam_export.parity.rollout import (
    Progress,
    Run,
    SessionLike,
    begin,
    run_free,
    run_locked,
)
from sam_export.parity.series import TensorSeries, series_of
from sam_export.parity.step_oracle import oracle_of
from sam_export.parity.subjects import built, existing, has_stages, with_unseen_size
from sam_export.parity.tolerances import Mode, Tolerances
from sam_export.parity.verdict import Row, judge_steps, rows_per_step, worst_per_step
from sam_export.runtime.cuda_options import CudaOptions
from sam_export.step.train_step import TrainStep
from sam_export.tracing.captured_step import CapturedStep
from sam_export.tracing.dynamic import Dynamic

STAGED_STEPS = 3
"""Lock-steps of a target with its stages: each begins at eager's state, so few say all."""

IN_STAGES = ", in stages"
"""Of the name of an artifact whose steps are taken in their three stages."""

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
    *,
    artifacts: Mapping[str, str | os.PathLike[str]] | None = None,
    reference: Reference | None = None,
    cache: str | os.PathLike[str] | None = None,
    isolate: bool = True,
    stages: bool = False,
    command: str | None = None,
    cuda: CudaOptions | None = None,
) -> ParityReport:
    """Compares the step of each target with plain eager PyTorch, by name and by change.

    Every target is exported, loaded and run twice through ``num_steps`` steps beside an oracle
    that shares no code with this package: free-running from the start state, and in lock-step,
    where each step starts from eager's state. A target passes when no tensor and no metric of
    either is further from the float64 oracle than a right step can be (`Tolerances`), and when it
    obeys the laws of `parity.laws`. In the middle of the free run it goes on from a checkpoint in a
    new process. Where all batches are of one size, one smaller one is added.

    Args:
        step: The eager step; model and optimizer are left as they are.
        batches: Tuples or dicts of tensors or NumPy arrays, of any sizes that the step takes; they
            are cycled where there are fewer than ``num_steps``.
        targets: Names of targets; None: all that there are, or none where ``sessions`` or
            ``artifacts`` are given.
        num_steps: Steps of each rollout, at least 1.
        device: Where the targets run.
        sessions: Sessions that exist already, by a name for the report. They are put to the start
            of ``step`` and get their state back at the end; their step count goes on.
        seed: Of torch's generators before each step and of the oracle's permutations.
        tolerances: Other numbers than the defaults.
        progress: Called with a phase, the steps done and the steps to do.
        dynamic: Which sizes stay symbolic in the targets, as `capture` takes it: ``"batch"``, None,
            or per input ``{"x": {0: "batch", 1: "time"}}``. The batches may then differ in them.
        artifacts: Folders of artifacts that exist already, by a name for the report. They run from
            where ``step`` is, with its ``lr`` and ``rho``; in what else they were made for another
            step is said in the report's notes. One that was captured with ``staged=True`` is also
            run in its stages, as ``<name>, in stages``.
        reference: Your own eager loop, see `parity.reference.Reference`: is it this step, and if
            not, in which choice does it differ?
        cache: Folder in which the targets' artifacts are kept for the next check, by the hash of
            the graph; None: they are built anew and thrown away.
        isolate: Whether each target runs in a process of its own, so that a crash of a native
            runtime is a failed target.
        stages: Whether each target is also built with both gradients and the perturbation of every
            parameter as outputs, and a few lock-steps of that compared, as ``<target>, stages``:
            they say where a difference begins. The target's own verdict is that of its shipped
            form, since more outputs change what a runtime fuses.
        command: What the report says for repeating the check; None: the call of this function.
        cuda: Options for a CUDA device, as `sam_export.load` takes them. With ``tf32`` a step is
            judged by the same bound, which its rounding exceeds.

    Returns:
        The report. A target that cannot be built or run is a failed one, not an error. After
        Ctrl-C it holds what was compared until then, and is not ``ok``.

    Raises:
        ParityError: Nothing can be compared: no batch, no step, no target, or eager itself fails.
        StepConfigError: ``dynamic`` does not fit the batch.
        CaptureError: The step cannot be captured.
    """
    given, folders = dict(sessions or {}), dict(artifacts or {})
    chosen = tuple(targets) if targets is not None else () if given or folders else DEFAULT_TARGETS
    staged = [f"{target}, stages" for target in chosen] if stages else []
    forms = {name: [False, True][: 1 + has_stages(Path(f))] for name, f in folders.items()}
    in_folders = [name + IN_STAGES * form for name in folders for form in forms[name]]
    names = (*given, *in_folders, *chosen, *staged)
    _check_request(batches, num_steps, chosen, names)
    if cuda is not None and not device.startswith("cuda"):
        raise ParityError(
            f"{cuda} was given with device={device!r}; pass device='cuda' too, or leave it out."
        )
    tol = tolerances or Tolerances()
    if dynamic == "batch":
        batches = with_unseen_size(batches, num_steps, step.semantics.micro_batches)
    done: dict[str, TargetReport] = {}
    facts: dict[str, dict[str, Any]] = {}
    interrupted = False
    eager: tuple[Law, ...] = ()
    compared: ReferenceResult | None = None
    with _own_generators():
        panel = Panel(lambda: oracle_of(step), batches, seed, tol)
        tell = progress or (lambda phase, at, total: None)
        check = _Check(panel, num_steps, tol, tell, done, facts)
        try:
            eager = laws_of_eager(panel)
            if reference is not None:
                compared = compare_reference(reference, step, panel, min(num_steps, 5))
            for name, session in given.items():
                with _kept_state(Run(name, session)) as run:
                    check.drive(run, reset=True)
            for name, folder in folders.items():
                for form in forms[name]:
                    with existing(
                        name + IN_STAGES * form, Path(folder), step, device, isolate, panel.notes,
                        cuda, form,
                    ) as run:  # fmt: skip
                        check.drive(run, reset=True)
            captured = None
            kept = None if cache is None else Path(cache)
            for target in chosen:
                if captured is None:
                    check.tell("capture", 0, 1)
                    captured = capture_example(step, batches[0], dynamic)
                    check.tell("capture", 1, 1)
                check.tell(f"build {target}", 0, 1)
                with built(captured, target, device, kept, isolate, cuda) as run:
                    check.tell(f"build {target}", 1, 1)
                    check.drive(run, reset=False)
            if staged:
                more = Panel(lambda: oracle_of(step), batches, seed, tol, stages=True)
                inner = replace(check, panel=more, num_steps=min(num_steps, STAGED_STEPS))
                captured = capture_example(step, batches[0], dynamic, stages=True)
                for target, name in zip(chosen, staged, strict=True):
                    check.tell(f"build {name}", 0, 1)
                    with built(captured, target, device, kept, isolate, cuda) as run:
                        run.name = name
                        inner.drive(run, reset=False, whole=False)
        except KeyboardInterrupt:
            interrupted = True
            panel.notes.append("interrupted: only what was compared until then is here")
    for name in names:
        facts.setdefault(name, {})
        if name not in done:
            done[name] = TargetReport(name, None, (), (), (), "not run: interrupted", 0.0)
    return ParityReport(
        targets=tuple(done[name] for name in names),
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
        laws=eager,
        reference=compared,
        interrupted=interrupted,
        ledger=ledger(seed, step.seed, device, facts, cuda),
        command=command or _call(chosen, names, num_steps, device, seed, dynamic, cuda),
    )


@dataclass
class _Check:
    """Drives runs one after the other, and keeps a report of each, also of one that ends early."""

    panel: Panel
    num_steps: int
    tol: Tolerances
    tell: Progress
    done: dict[str, TargetReport]
    facts: dict[str, dict[str, Any]]

    def drive(self, run: Run, reset: bool, whole: bool = True) -> None:
        """Both rollouts and the laws of one run; or its lock-steps only."""

        def tell(phase: str, at: int, total: int) -> None:
            self.tell(f"{run.name}: {phase}", at, total)

        laws: tuple[Law, ...] = ()
        self.facts[run.name] = _facts(run)
        try:
            if run.error is None:
                begin(run, self.panel, reset)
            if whole:
                run_free(self.panel, [run], self.num_steps, self.tol, tell)
            run_locked(self.panel, [run], self.num_steps, self.tol, tell)
            if run.error is None and whole:
                with run.guarded("laws"):
                    laws = laws_of_target(run, self.panel, self.tol)
        except KeyboardInterrupt:
            run.error = run.error or "interrupted"
            raise
        finally:
            self.done[run.name] = _judged(run, self.panel, self.tol, laws)


def _call(
    targets: Sequence[str],
    names: Sequence[str],
    num_steps: int,
    device: str,
    seed: int,
    dynamic: Dynamic,
    cuda: CudaOptions | None,
) -> str:
    """The Python call that repeats a check, but for what only the caller has."""
    given: dict[str, Any] = {
        "targets": list(targets),
        "num_steps": num_steps,
        "device": device,
        "seed": seed,
    }
    if dynamic != "batch":
        given["dynamic"] = dynamic
    if cuda is not None:
        given["cuda"] = cuda
    words = [f"{key}={value!r}" for key, value in given.items()]
    others = [name for name in names if name not in targets]
    if others:
        words.append(f"sessions or artifacts={{{', '.join(f'{name!r}: ...' for name in others)}}}")
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
    names: Sequence[str],
) -> None:
    if not len(batches):
        raise ParityError(
            "check_parity was given no batch; pass at least one, as the step takes it."
        )
    if num_steps < 1:
        raise ParityError(f"num_steps={num_steps}: at least one step is needed to compare.")
    if not names:
        raise ParityError(
            "check_parity was given no target, session or artifact, so there is nothing to "
            f"compare; pass targets={list(DEFAULT_TARGETS)}."
        )
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ParityError(f"Given twice: {', '.join(double)}. Each name stands for one row.")
    for index, batch in enumerate(batches):
        if not isinstance(batch, (tuple, list, Mapping)):
            raise ParityError(
                f"Batch {index} is a {type(batch).__name__}; expected a tuple or a dict of tensors."
            )


def capture_example(
    step: TrainStep, batch: Batch, dynamic: Dynamic, stages: bool = False
) -> CapturedStep:
    """The step, captured with a batch of tensors or arrays."""
    from sam_export.tracing.capture import capture

    return capture(step, _example(step, batch), dynamic=dynamic, stages=stages)


def _example(step: TrainStep, batch: Batch) -> Any:
    device = next(step.model.parameters()).device

    def tensor(value: Any) -> torch.Tensor:
        whole = value if isinstance(value, torch.Tensor) else torch.tensor(np.asarray(value))
        return whole.to(device)

    if isinstance(batch, Mapping):
        return {key: tensor(value) for key, value in batch.items()}
    return tuple(tensor(value) for value in batch)


def _judged(run: Run, panel: Panel, tol: Tolerances, laws: tuple[Law, ...] = ()) -> TargetReport:
    roles = dict.fromkeys(panel.parameters, "parameter")
    metrics = (*METRICS, CLIPPED_METRIC, SCALED_METRIC, "finite")
    roles |= dict.fromkeys(metrics, "metric")
    roles |= {name: "stage" for at in run.locked for name in at if name.startswith(STAGE)}
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
        worst[mode] = worst_per_step(steps, noise, metrics)
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
        laws=laws,
        resumed_after=run.resumed_after,
        series=tuple(series),
        differences=chosen_differences(run.described, failed, series, panel.parameters),
    )


@contextmanager
def _own_generators() -> Iterator[None]:
    """Leaves torch's generators as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


@contextmanager
def _kept_state(run: Run) -> Iterator[Run]:
    """Gives the user's session its state back."""
    before = dict(run.session.state)
    try:
        yield run
    finally:
        with run.guarded("putting the state back"):
            run.session.set_state(before)
