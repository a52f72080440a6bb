"""A SAM step that holds every fault of `mutants` at once, behind one number of its state.

It is the package's own `TrainStep`. The faults are put in where its parts meet: between the two
passes, between gradients and update, and at the results. So what a target gets is the graph that it
gets from any step, with selections in it, and one artifact (one compilation) holds all faults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sam_export._compat.program import appended, returning
from sam_export.artifact.contract import NEXT, STEP
from sam_export.parity.faults import SELECTOR, Faults
from sam_export.parity.mutants import MUTANTS, NUMBERS, ModelName
from sam_export.step.batch import BatchLayout
from sam_export.step.gradient import Objective
from sam_export.step.passes import Passes
from sam_export.step.sam import SAM
from sam_export.step.train_step import TrainStep
from sam_export.step.update import Slots, apply_update
from sam_export.tracing.capture import capture
from sam_export.tracing.captured_step import CapturedStep


def captured_mutants(kind: ModelName, step: TrainStep, batch: Sequence[Tensor]) -> CapturedStep:
    """The step with every fault that this model can have, captured as any step is.

    Args:
        kind: Which model it is, for the table of faults.
        step: A right step; its model gets one buffer more, `SELECTOR`.
        batch: An example batch.
    """
    step.model.register_buffer(SELECTOR, torch.zeros((), dtype=torch.int64))
    mutated = MutatedStep(kind, step)
    return _with_wrong_results(kind, capture(mutated, batch))


class MutatedStep(TrainStep):
    """A step whose buffer `SELECTOR` selects a fault.

    With 0 it computes what ``step`` computes, bit for bit: every selection takes the right value,
    and what is added to the weights of the second pass is zero.

    Args:
        kind: Which model it is, for the table of faults.
        step: The right step.
    """

    def __init__(self, kind: ModelName, step: TrainStep) -> None:
        assert isinstance(step.optimizer, SAM)
        super().__init__(
            step.model,
            step.loss_fn,
            step.optimizer,
            step.num_targets,
            step.semantics,
            step.seed,
            step.autocast,
            step.loss_scaling,
        )
        self._kind = kind
        self._faults: Faults | None = None

    def objective(self, layout: BatchLayout, values: Sequence[Tensor]) -> Objective:
        """The loss of one batch; inside `pure` with the faults between the passes."""
        right = super().objective(layout, values)
        faults = self._faults
        if faults is None:
            return right
        turned = [faults.pick("other dropout mask", v.flip(0), v) for v in values]
        return faults.between(right, super().objective(layout, turned))

    def pure(  # type: ignore[override]
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        slots: Slots,
        hyper: Mapping[str, Tensor],
        layout: BatchLayout,
        values: Sequence[Tensor],
        **options: Any,
    ) -> tuple[Passes, dict[str, Tensor], Slots]:
        """`TrainStep.pure`, with the selected fault."""
        faults = Faults(self._kind, buffers[SELECTOR], values)
        names = [list(group.names) for group in self.groups()]
        hyper = faults.in_hyper(hyper)
        faults.begin(parameters, buffers, slots, hyper["rho"], names)
        given = faults.in_slots(slots, buffers)
        self._faults = faults
        try:
            passes, updated, new_slots = super().pure(
                parameters, buffers, given, hyper, layout, values, **options
            )
        finally:
            self._faults = None
        trained = {name: parameters[name] for part in names for name in part}
        for mutant in MUTANTS:
            if mutant.options and self._kind in mutant.models:
                other, other_slots = apply_update(
                    self.optimizer.base_optimizer,
                    trained,
                    passes.gradients,
                    given,
                    names,
                    [{"lr": lr, **mutant.options} for lr in hyper["lr"].unbind()],
                )
                updated, new_slots = faults.chosen(
                    mutant.name, (other, other_slots), (updated, new_slots)
                )
        return (
            faults.in_passes(passes),
            faults.in_parameters(updated, parameters),
            faults.in_new_slots(new_slots, slots),
        )


def _with_wrong_results(kind: ModelName, captured: CapturedStep) -> CapturedStep:
    """Adds the faults that `capture` rightly refuses, or has no place for, to the graph itself."""
    spec = captured.contract.program("step")
    names = [output.name for output in spec.outputs]
    aten = torch.ops.aten

    def chosen(graph: Any, inputs: Any, results: Any) -> Any:
        given = dict(zip(spec.inputs, inputs, strict=True))
        made = dict(zip(names, results, strict=True))

        def pick(fault: str, output: str, wrong: Any) -> None:
            number = NUMBERS[fault]
            is_on = appended(graph, aten.eq.Scalar, given[SELECTOR], number)
            made[output] = appended(graph, aten.where.self, is_on, wrong, made[output])

        pick("other loss reported", "loss", made["perturbed_loss"])
        if NEXT + STEP in made:
            pick("random numbers repeat", NEXT + STEP, given[STEP])
        return [made[name] for name in names]

    return replace(
        captured,
        programs={**captured.programs, "step": returning(captured.programs["step"], chosen)},
    )
