"""`self_test`: does the parity check find every fault that it is there to find?

A check that passes a wrong step is worse than none. So each fault of `mutants` is made a real
artifact of each target, and `check_parity` has to fail it, as it is by default; and the right step,
in the same artifact, has to pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from sam_export.api import load
from sam_export.errors import LoweringError, ParityError
from sam_export.parity.check import DEFAULT_TARGETS, check_parity
from sam_export.parity.faults import SELECTOR
from sam_export.parity.mutants import MUTANTS, NUMBERS, ModelName
from sam_export.parity.mutated_step import captured_mutants
from sam_export.parity.panel import METRICS
from sam_export.parity.report import TargetReport
from sam_export.parity.rollout import Progress
from sam_export.parity.self_test_models import batches_of, step_of
from sam_export.parity.self_test_report import Outcome, Result, SelfTestReport
from sam_export.runtime.session import Session

CONTROL = "(none: the right step)"
"""Name of the row that has to pass."""


@dataclass(frozen=True)
class _Result:
    """The fields of `StepResult` that the check reads, as numbers."""

    loss: float
    perturbed_loss: float
    grad_norm: float
    perturbation_norm: float
    finite: bool
    loss_scale: float | None = None


class MutantSession:
    """One fault of an artifact that holds all, as a session of its own.

    Many of them share one loaded artifact (compiling takes minutes): each keeps its own state, and
    hands it over with its number for every step.

    Args:
        shared: A session of the artifact.
        number: Value of the selector.
    """

    def __init__(self, shared: Session, number: int) -> None:
        self.contract = shared.contract
        self.known_rounding = shared.known_rounding
        self.provider = shared.provider
        self._shared = shared
        self._number = np.array(number, dtype=np.int64)
        self._state = shared.state

    @property
    def state(self) -> Mapping[str, NDArray[Any]]:
        """The state without the selector, of which eager knows nothing."""
        return {name: value for name, value in self._state.items() if name != SELECTOR}

    def set_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """As `Session.set_state`; the selector stays."""
        self._state = {**state, SELECTOR: self._number}

    def step(self, *batch: Any) -> _Result:
        """One step from this session's state, with its fault."""
        self._shared.set_state({**self._state, SELECTOR: self._number})
        result = self._shared.step(*batch)
        numbers = {name: float(getattr(result, name)) for name in METRICS}
        finite = bool(result.finite)
        scale = None if result.loss_scale is None else float(result.loss_scale)
        self._state = self._shared.state
        return _Result(**numbers, finite=finite, loss_scale=scale)


def self_test(
    targets: Sequence[str] | None = None,
    num_steps: int = 20,
    device: str = "cpu",
    progress: Progress | None = None,
) -> SelfTestReport:
    """Puts every fault of `mutants.MUTANTS` into each target and checks that it is found.

    Two small models: convolutions with BatchNorm under SGD with momentum and weight decay, and
    layers with dropout under AdamW with two parameter groups; every fault is one in at least one of
    them. For each model and target there is one artifact with all faults; one state tensor of it
    selects which. All else is as `check_parity` has it by default.

    Args:
        targets: Names of targets; None: those that `check_parity` takes by default.
        num_steps: Steps of each rollout.
        device: Where the targets run.
        progress: Called with a phase, the steps done and the steps to do.

    Returns:
        The report; it is ``ok`` if every fault was found in every target, and no right step failed.
        A target that cannot be built or loaded is a row in it, not an error.

    Raises:
        ParityError: No target, or nothing to compare with.
    """
    chosen = tuple(targets) if targets is not None else DEFAULT_TARGETS
    if not chosen or len(set(chosen)) != len(chosen):
        raise ParityError(
            f"self_test was given the targets {list(chosen)}; expected at least one, each once, "
            f"such as {list(DEFAULT_TARGETS)}."
        )
    outcomes: list[Outcome] = []
    for kind in get_args(ModelName):
        outcomes += _of_model(kind, chosen, num_steps, device, progress)
    order = [CONTROL, *NUMBERS]
    outcomes.sort(key=lambda outcome: order.index(outcome.mutant))
    return SelfTestReport(chosen, num_steps, tuple(outcomes))


def _of_model(
    kind: ModelName,
    targets: Sequence[str],
    num_steps: int,
    device: str,
    progress: Progress | None,
) -> list[Outcome]:
    tell = progress or (lambda phase, done, total: None)
    names = [CONTROL, *(mutant.name for mutant in MUTANTS if kind in mutant.models)]
    outcomes: list[Outcome] = []
    batches = batches_of(kind)
    tell(f"capture {kind}", 0, 1)
    captured = captured_mutants(kind, step_of(kind), batches[0])
    tell(f"capture {kind}", 1, 1)
    sessions: dict[str, MutantSession] = {}
    for index, target in enumerate(targets):
        tell(f"build {kind} for {target}", index, len(targets))
        try:
            shared = load(captured, device=device, target=target)
        except Exception as error:
            verdict: Result = "refused" if isinstance(error, LoweringError) else "error"
            text = f"build: {type(error).__name__}: {error}"
            outcomes += [Outcome(name, kind, target, verdict, note=text) for name in names]
        else:
            for name in names:
                number = 0 if name == CONTROL else NUMBERS[name]
                sessions[f"{target}: {name}"] = MutantSession(shared, number)
        tell(f"build {kind} for {target}", index + 1, len(targets))
    if not sessions:
        return outcomes
    report = check_parity(
        step_of(kind),
        batches,
        num_steps=num_steps,
        device=device,
        sessions=sessions,
        progress=lambda phase, done, total: tell(f"{kind}, {phase}", done, total),
    )
    for judged in report.targets:
        target, _, name = judged.name.partition(": ")
        outcomes.append(_outcome(name, kind, target, judged))
    return outcomes


def _outcome(name: str, kind: ModelName, target: str, judged: TargetReport) -> Outcome:
    if judged.error is not None:
        # Not a verdict on the numbers, so it does not show that they would be found wrong.
        return Outcome(name, kind, target, "error", note=judged.error)
    if name == CONTROL:
        verdict: Result = "passed" if judged.ok else "false alarm"
    else:
        verdict = "slipped" if judged.ok else "caught"
    rows = judged.failed or judged.worst([*judged.rows])
    worst = rows[0]
    return Outcome(
        name,
        kind,
        target,
        verdict,
        tensor=worst.name,
        role=worst.role,
        mode=worst.mode,
        step=worst.step,
        margin=worst.badness,
        failed=len(judged.failed),
        note=worst.note,
    )
