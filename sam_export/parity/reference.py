"""The eager loop that a user runs today against the step: the same, or in which choice not.

Libraries and hand-written loops make the semantic choices of `Semantics` without saying so. Here
the oracle is run with each choice changed, alone and in pairs, until one equals the loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from sam_export.errors import ParityError
from sam_export.parity.compare import State, change, norm
from sam_export.parity.oracle import Oracle
from sam_export.parity.oracle_batch import Batch
from sam_export.parity.panel import Panel
from sam_export.step.train_step import TrainStep

EQUAL = 1e-6
"""float64: two right loops that order their operations differently agree to 1e-12 of the change;
the smallest effect of a choice was 1e-3 of it (running statistics counted twice, first step)."""


class Reference(Protocol):
    """A function that makes the user's step over a model.

    It gets a copy of the model and a stock optimizer over it, of the class and with the options of
    the step's base optimizer, each group with its ``rho``; it may ignore the optimizer and make its
    own. It returns a function that takes a batch as the step does, trains the model in place, and
    returns the loss.
    """

    def __call__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, /
    ) -> Callable[..., Any]: ...


@dataclass(frozen=True)
class ReferenceResult:
    """How the user's loop compares with the step.

    Attributes:
        equal: Whether it is the same step.
        differs_in: The choices in which it differs, as sentences; empty if ``equal``, or if no
            change of one or two choices explains it.
        error: Largest distance of a tensor's change from the step's, relative to that change.
        tensor: The tensor with that distance.
        steps: Steps that were compared.
    """

    equal: bool
    differs_in: tuple[str, ...]
    error: float
    tensor: str
    steps: int

    def __str__(self) -> str:
        if self.equal:
            return f"the same step ({self.steps} steps, to {self.error:.1e} of each change)"
        found = f"another step (the change of {self.tensor} differs by {self.error:.1e} of it)"
        if not self.differs_in:
            return f"{found}; no one or two of the known choices explain it"
        return f"{found}: {' and '.join(self.differs_in)}"


def compare_reference(
    reference: Reference, step: TrainStep, panel: Panel, steps: int
) -> ReferenceResult:
    """Runs the user's loop and the oracle, as it is and with other choices, from the same start.

    In float64 where the loop runs in it, else in the model's dtype. Only parameters, buffers and
    losses are compared: the loop's optimizer may keep its slots as it likes.

    Args:
        reference: See `Reference`.
        step: The step whose choices are the first to be tried.
        panel: For the start, the batches and the seeds.
        steps: How many steps.

    Raises:
        ParityError: The loop raised, or returned something else than a loss.
    """
    try:
        losses, state = _run_loop(reference, panel, steps, double=True)
        double = True
    except Exception:
        losses, state = _run_loop(reference, panel, steps, double=False)
        double = False
    bound = EQUAL if double else panel.tolerances.drift
    first: tuple[float, str] | None = None
    for changes in _choices(step):
        oracle = panel.oracle(double)
        for apply in changes.values():
            apply(oracle)
        metrics = []
        for index in range(steps):
            panel.seed_generators(index)
            metrics.append(oracle.step(panel.batch(index)))
        found = _distance(panel.start, state, oracle.snapshot(), step)
        first = first or found
        if found[0] <= bound:
            said = list(changes)
            reported = _reported(losses, metrics, bound)
            said += [reported] if reported else []
            return ReferenceResult(not said, tuple(said), first[0], first[1], steps)
    assert first is not None
    return ReferenceResult(False, (), first[0], first[1], steps)


def _choices(step: TrainStep) -> Iterator[Mapping[str, Callable[[Oracle], None]]]:
    """No change, each single one, each pair; sentence to what changes it in an oracle."""
    own = step.semantics
    single: dict[str, Callable[[Oracle], None]] = {}
    stats = "both" if own.running_stats == "ascent" else "ascent"
    passes = {"both": "both passes update the running statistics",
              "ascent": "only the first pass updates the running statistics"}  # fmt: skip
    single[passes[stats]] = lambda oracle: setattr(oracle, "running_stats", stats)
    draws = "fresh" if own.randomness == "same" else "same"
    words = {"fresh": "the second pass draws its own random numbers",
             "same": "both passes use the same random numbers"}  # fmt: skip
    single[words[draws]] = lambda oracle: setattr(oracle, "randomness", draws)
    decay = "is not" if own.decay_in_ascent else "is"
    single[f"weight decay {decay} part of the gradient that is ascended"] = lambda oracle: setattr(
        oracle, "decay_in_ascent", not own.decay_in_ascent
    )
    single["there is no perturbation: this is the base optimizer alone"] = lambda oracle: _scale(
        oracle, 0.0
    )
    single["the perturbation has the opposite sign"] = lambda oracle: _scale(oracle, -1.0)
    single["each parameter is perturbed by rho, with its own norm"] = lambda oracle: setattr(
        oracle, "norm_over", "tensor"
    )
    yield {}
    for name, apply in single.items():
        yield {name: apply}
    for (one, first), (other, second) in itertools.combinations(single.items(), 2):
        yield {one: first, other: second}


def _scale(oracle: Oracle, factor: float) -> None:
    for group in oracle.optimizer.param_groups:
        group[oracle.radius] *= factor


def _run_loop(
    reference: Reference, panel: Panel, steps: int, double: bool
) -> tuple[list[float], State]:
    oracle = panel.oracle(double)
    losses = []
    try:
        loop = reference(oracle.model, oracle.optimizer)
        for index in range(steps):
            panel.seed_generators(index)
            batch: Batch = oracle.tensors(panel.batch(index))
            arguments = (batch,) if isinstance(batch, Mapping) else tuple(batch)
            losses.append(float(loop(*arguments)))
    except Exception as error:
        raise ParityError(
            f"The reference loop raised {type(error).__name__}: {error}. It is called as "
            "reference(model, optimizer), and what that returns with a batch; it trains the model "
            "in place and returns the loss."
        ) from error
    return losses, oracle.snapshot()


def _distance(start: State, found: State, wanted: State, step: TrainStep) -> tuple[float, str]:
    """Largest relative distance of a change, over parameters and floating buffers."""
    names = [name for name, _ in step.model.named_parameters()]
    names += [name for name, value in step.model.named_buffers() if value.is_floating_point()]
    worst = (0.0, names[0])
    for name in names:
        moved = norm(change(start, wanted, name))
        apart = norm(found[name].astype(np.float64) - wanted[name].astype(np.float64))
        floor = 1e-14 * norm(wanted[name].astype(np.float64))
        relative = 0.0 if apart <= floor else apart / max(moved, floor)
        worst = max(worst, (relative, name))
    return worst


def _reported(
    losses: list[float], metrics: list[dict[str, float | bool]], bound: float
) -> str | None:
    """In which loss it is that the loop returns; None for the first pass's."""

    def are(name: str) -> bool:
        return all(
            abs(loss - float(each[name])) <= bound * abs(float(each[name]))
            for loss, each in zip(losses, metrics, strict=True)
        )

    if are("loss"):
        return None
    if are("perturbed_loss"):
        return "the loss that it returns is that of the second pass"
    return "the loss that it returns is that of neither pass"
