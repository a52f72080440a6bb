"""The oracle runs that a target is judged by: the judge, eager as it is, and eager disturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from sam_export.errors import ParityError
from sam_export.parity.compare import State
from sam_export.parity.disturb import (
    about_casts,
    can_permute,
    jittered,
    jittered_input,
    map_batch,
    moves,
    permuted,
)
from sam_export.parity.one_by_one import OneByOne
from sam_export.parity.oracle import Oracle
from sam_export.parity.oracle_batch import Batch
from sam_export.parity.oracle_once import base_step
from sam_export.parity.oracle_surroundings import flat_generator_states
from sam_export.parity.tolerances import Tolerances

_FIRST_DISTURBED = 2
"""The runs before it see weights and batch as they are: eager, and eager with plain sums."""

METRICS = ("loss", "perturbed_loss", "grad_norm", "perturbation_norm")

KEPT_BYTES = 2**28
"""Room for the rounds that the next target is compared with too; others are run again for it."""


@dataclass(frozen=True)
class Stepped:
    """What one contestant made of one step.

    Attributes:
        metrics: ``loss``, ``perturbed_loss``, ``grad_norm``, ``perturbation_norm``.
        finite: The step's own word on whether all was finite.
        state: State after it, by name.
        start: State that its change counts from.
    """

    metrics: dict[str, float]
    finite: bool
    state: State
    start: State


@dataclass(frozen=True)
class Round:
    """One step of all oracle runs.

    Attributes:
        judge: The reference.
        runs: In the model's dtype; the first one is eager as it is.
        untrained: Parameters that got no gradient.
        wide: With autocast: eager with the sums of a plain loop, without the casts.
    """

    judge: Stepped
    runs: tuple[Stepped, ...]
    untrained: frozenset[str]
    wide: Stepped | None = None

    @property
    def eager(self) -> Stepped:
        """Eager in the model's dtype, undisturbed."""
        return self.runs[0]


class Panel:
    """All oracle runs over one model, its optimizer and its batches.

    The judge is the oracle in float64. A model that draws from torch's generator draws others in
    float64, and some models cannot run in float64: eager in the model's own dtype is the judge
    then, and `notes` says so.

    All runs but the first add up as a plain loop does (`OneByOne`): some of eager's own kernels
    are more exact than a right step has to be, and a loop's error is no error of data. One of them
    sees weights and batch as they are. The disturbed runs see their batches permuted. Below
    float64 their weights and inputs are also off by up to one rounding: an algorithm is as good as
    can be if its result is the exact one for data so disturbed (backward stability), and one
    kernel's own error may be luckily small. The same is done in float64 where permuting is no mere
    change of rounding (random numbers, a loss that depends on the order, fewer than three
    examples); `notes` says so.

    With autocast one rounding is one of its dtype, half of which a cast may lose; and one run more
    is without the casts, so that what sums lose and what casts lose are told apart.

    Args:
        make: Makes a fresh oracle at the start state.
        batches: As the user gave them; they are cycled.
        seed: Of the permutations and of torch's generators before each step.
        tol: How many disturbed runs.
        stages: Whether states hold the gradients and perturbations of the step, too.

    Raises:
        ParityError: Eager itself cannot run the step.
    """

    def __init__(
        self,
        make: Callable[[], Oracle],
        batches: Sequence[Batch],
        seed: int,
        tol: Tolerances,
        stages: bool = False,
    ) -> None:
        self.batches = batches
        self.seed = seed
        self.tolerances = tol
        self.stages = stages
        self.permutations = tol.permutations
        self.notes: list[str] = []
        try:
            probe = make()
            drew = self._draws_random_numbers(probe)
        except Exception as error:
            raise ParityError(
                f"Eager itself cannot run this step, so there is nothing to compare with: "
                f"{type(error).__name__}: {error}"
            ) from error
        # Numbers of the step's own generator are the same in every dtype, and part of the state.
        own = drew and probe.generator == "philox"

        def made() -> Oracle:
            oracle = make()
            oracle.is_counting = own
            oracle.keeps_stages = stages
            return oracle

        self._make = made
        self.start = made().snapshot()
        self.parameters = frozenset(probe.parameter_names)
        self.buffers = frozenset(n for n, _ in probe.model.named_buffers())
        self.dtype = str(next(self.start[n].dtype for n in probe.parameter_names))
        self._eager = made()
        self.casts_to = probe.precision.autocast
        self.parts = probe.micro_batches
        self._plain = self._without_casts()
        self.on_nonfinite = self._eager.on_nonfinite
        self.draws = drew
        self.metrics = METRICS + (("perturbed_grad_norm",) if probe.clips else ())
        self.metrics += tuple(probe.precision.results())
        self.scaler = frozenset(probe.precision.snapshot())
        others = drew and not own
        self.judge = self._make_judge(others)
        self.nudge, self._jitter = moves(self.dtype, self.casts_to, tol)
        if self.casts_to is not None:
            self.notes.append(about_casts(self.casts_to, tol))
        self._permutes = not drew and self._order_is_neutral()
        self._jitters = not self._permutes or self.dtype != "float64"
        if not self._permutes:
            self.notes.append(
                "noise floor without permutations (random numbers, a loss that depends on the "
                "order, or too few examples): weights and inputs off by one rounding"
            )
        self._others = others
        self._kept: dict[tuple[str, int], Round] = {}
        self._room = KEPT_BYTES
        self._begin()

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        return self.batches[step % len(self.batches)]

    def seed_generators(self, step: int) -> None:
        """Puts torch's generators where every contestant of this step finds them."""
        torch.manual_seed(self.seed * 1_000_003 + step)

    def free(self, step: int) -> Round:
        """A step of the free-running oracles; what was not kept is run again from the start."""
        if ("free", step) in self._kept:
            return self._kept["free", step]
        if self._position > step:
            self._begin()
        while True:
            at = self._position
            this = self._round(self._free, self.batch(at), at)
            self._position += 1
            if at == step:
                return self._keep("free", step, this)

    def locked(self, state: State, step: int) -> Round:
        """`lock` with the batch of the step, from the state that eager had before it."""
        kept = self._kept.get(("locked", step))
        return kept or self._keep("locked", step, self.lock(state, step, self.batch(step)))

    def lock(self, state: State, step: int, batch: Batch) -> Round:
        """One step of every oracle run from ``state``."""
        self.judge.load(state)
        results: list[Stepped] = []
        for variant in range(_FIRST_DISTURBED + self.permutations):
            start = self._disturbed_state(state, variant, step)
            self._eager.load(start)
            disturbed = self._disturbed_batch(batch, variant, step)
            results.append(self._stepped(self._eager, start, disturbed, step, variant))
        beside = [(self.judge, state), *((oracle, state) for oracle in self._plain)]
        for oracle in self._plain:
            oracle.load(state)
        return self._checked(beside, results, batch, step, self._eager.without_gradient)

    def nudged(
        self, state: State, batch: Batch, step: int, attempt: int, ulps: float
    ) -> tuple[State, Batch]:
        """Weights and inputs moved by up to ``ulps`` roundings, for a retest."""
        rng = np.random.default_rng([self.seed, 7, step, attempt])
        moved = {
            name: jittered(value, ulps, rng) if name in self.parameters else value
            for name, value in state.items()
        }
        return moved, map_batch(batch, lambda value: jittered_input(value, ulps, rng, self.dtype))

    def oracle(self, double: bool) -> Oracle:
        """A fresh oracle at the start state, which draws from torch's generators."""
        oracle = self._make()
        oracle.generator, oracle.is_counting = "torch", False
        return oracle.double() if double else oracle

    @property
    def rho(self) -> list[float]:
        """Radius of each parameter group."""
        return [float(group[self.judge.radius]) for group in self.judge.optimizer.param_groups]

    @contextmanager
    def radius(self, rho: float) -> Iterator[None]:
        """`lock` with this ``rho`` in every group."""
        before = self.rho
        groups = [o.optimizer.param_groups for o in (self.judge, self._eager)]
        try:
            for own in groups:
                for group in own:
                    group[self.judge.radius] = rho
            yield
        finally:
            for own in groups:
                for group, value in zip(own, before, strict=True):
                    group[self.judge.radius] = value

    def base_step(self, state: State, batch: Batch) -> State:
        """State after one step of the base optimizer alone, as the judge computes it."""
        self.seed_generators(0)
        self.judge.load(state)
        base_step(self.judge, batch)
        return self.judge.snapshot()

    # -- the runs -----------------------------------------------------------------------------

    def _begin(self) -> None:
        """Puts the free-running oracles to the start."""
        self._position = 0
        self._free: list[tuple[Oracle, State]] = [
            (self._make_judge(self._others, quiet=True), self.start)
        ]
        for variant in range(_FIRST_DISTURBED + self.permutations):
            oracle = self._make()
            start = self._disturbed_state(self.start, variant, 0)
            oracle.load(start)
            self._free.append((oracle, start))
        self._free_plain = [(oracle, self.start) for oracle in self._without_casts()]

    def _keep(self, mode: str, step: int, this: Round) -> Round:
        """Keeps a round for the next target, as long as there is room."""
        size = sum(a.nbytes for run in (this.judge, *this.runs) for a in run.state.values())
        if size <= self._room:
            self._room -= size
            self._kept[mode, step] = this
        return this

    def _round(self, oracles: Sequence[tuple[Oracle, State]], batch: Batch, step: int) -> Round:
        results: list[Stepped] = []
        for variant, (oracle, start) in enumerate(oracles[1:]):
            disturbed = self._disturbed_batch(batch, variant, step)
            results.append(self._stepped(oracle, start, disturbed, step, variant))
        beside = [oracles[0], *self._free_plain]
        return self._checked(beside, results, batch, step, oracles[1][0].without_gradient)

    def _stepped(
        self,
        oracle: Oracle,
        start: State,
        batch: Batch,
        step: int,
        variant: int = 0,
        overflows: bool = False,
    ) -> Stepped:
        self.seed_generators(step)
        plain = OneByOne() if variant else nullcontext()  # type: ignore[no-untyped-call]
        with plain:
            values = oracle.step(batch, overflows)
        finite = bool(values.pop("finite"))
        return Stepped({k: float(v) for k, v in values.items()}, finite, oracle.snapshot(), start)

    def _checked(
        self,
        beside: Sequence[tuple[Oracle, State]],
        runs: list[Stepped],
        batch: Batch,
        step: int,
        untrained: set[str],
    ) -> Round:
        """The round of ``runs``, with the steps of the judge and of eager without casts.

        With a scaled loss, a step that overflows in every run is skipped by these two as well; they
        have room for it.
        """
        overflows = bool(self.scaler) and not any(run.finite for run in runs)
        judge, *wide = (
            self._stepped(oracle, start, batch, step, int(index > 0), overflows)
            for index, (oracle, start) in enumerate(beside)
        )
        verdicts = {result.finite for result in (judge, *wide, *runs)}
        if len(verdicts) > 1:
            raise ParityError(
                f"Step {step + 1} is finite in float64 and not in {self.dtype}, or only in some "
                "orders of the batch: eager itself is at the edge of overflow there, so there is "
                "nothing to compare with. Lower lr or rho, or scale the inputs."
            )
        if verdicts == {False} and self.on_nonfinite == "ignore":
            raise ParityError(
                f"Step {step + 1} is not finite in eager, and on_nonfinite='ignore' lets it reach "
                "the weights: there is nothing to compare with from there on. Give fewer steps or "
                "other batches."
            )
        return Round(judge, tuple(runs), frozenset(untrained), wide[0] if wide else None)

    # -- the judge and the disturbances -------------------------------------------------------

    def _draws_random_numbers(self, oracle: Oracle) -> bool:
        self.seed_generators(0)
        before = flat_generator_states()
        oracle.step(self.batches[0])
        pairs = zip(before, flat_generator_states(), strict=True)
        return any(not torch.equal(a, b) for a, b in pairs) or oracle.draws > 0

    def _make_judge(self, others: bool, quiet: bool = False) -> Oracle:
        reason = "the model draws random numbers, which are others in float64" if others else ""
        if not others:
            try:
                judge = self._make().double()
                judge.step(self.batches[0])
            except Exception as error:
                reason = f"in float64 the model fails with {type(error).__name__}: {error}"
        if reason and not quiet:
            self.notes.append(f"judged by eager in {self.dtype}: {reason}")
        if reason:
            return next(iter(self._without_casts()), None) or self._make()
        return self._make().double()

    def _without_casts(self) -> list[Oracle]:
        """With autocast, one oracle at the start state that does without."""
        if self.casts_to is None:
            return []
        oracle = self._make()
        oracle.precision.autocast = None
        return [oracle]

    def _order_is_neutral(self) -> bool:
        """Whether permuting the examples changes the loss by rounding only."""
        batch = next((b for b in self.batches if can_permute(b, self.parts)), None)
        if batch is None:
            return False
        losses = []
        for variant in (0, 1):
            self.judge.load(self.start)
            other = permuted(batch, np.random.default_rng(variant), self.parts)
            losses.append(self.judge.step(other)["loss"])
        # Summing n terms in another order errs by about sqrt(n) roundings; 1e4 is far above that
        # and far below what exchanging examples does to a loss that depends on their order.
        eps = np.finfo("float64" if self.judge.is_double else self.dtype).eps
        return not abs(losses[0] - losses[1]) > 1e4 * float(eps) * abs(losses[0])

    def _disturbed_state(self, state: State, variant: int, step: int) -> State:
        if variant < _FIRST_DISTURBED or not self._jitters:
            return state
        rng = np.random.default_rng([self.seed, 1, variant, step])
        return {
            name: jittered(value, self._jitter, rng) if name in self.parameters else value
            for name, value in state.items()
        }

    def _disturbed_batch(self, batch: Batch, variant: int, step: int) -> Batch:
        if variant < _FIRST_DISTURBED:
            return batch
        rng = np.random.default_rng([self.seed, 2, variant, step])
        permutes = self._permutes and can_permute(batch, self.parts)
        if permutes:
            batch = permuted(batch, rng, self.parts)
        if permutes and not self._jitters:
            return batch
        move = self._jitter
        return map_batch(batch, lambda value: jittered_input(value, move, rng, self.dtype))
