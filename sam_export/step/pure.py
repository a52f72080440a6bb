"""A step as a pure function of named tensors, which can be traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sam_export.step.batch import BatchLayout
from sam_export.step.draws import Draws
from sam_export.step.gradient import Objective, Parts
from sam_export.step.hyper import group_key
from sam_export.step.kind import Group
from sam_export.step.loss_scaling import Scaler
from sam_export.step.micro_batches import perturbed_passes
from sam_export.step.passes import Passes, one_pass
from sam_export.step.update import Slots, apply_update
from sam_export.step.variants.variant import Memory

if TYPE_CHECKING:
    from sam_export.step.train_step import TrainStep


def pure_step(
    step: TrainStep,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    slots: Slots,
    hyper: Mapping[str, Tensor],
    layout: BatchLayout,
    values: Sequence[Tensor],
    at: Callable[[str], None] = lambda stage: None,
    watch: Callable[[Tensor], None] = lambda loss: None,
    draws: Draws | None = None,
    stages: dict[str, Tensor] | None = None,
    started: Tensor | None = None,
    memory: Memory | None = None,
    perturbed: bool = True,
    starts_specially: bool = False,
    scaler: Scaler | None = None,
) -> tuple[Passes, dict[str, Tensor], Slots]:
    """The whole step as a function of its arguments; changes nothing.

    Args:
        step: Model, loss, optimizer and semantics.
        parameters: All parameters by name.
        buffers: All buffers by name.
        slots: State of the base optimizer by parameter name and slot key.
        hyper: ``lr``, ``rho`` and whatever else is no constant: float64[groups] each.
        layout: How the batch is divided.
        values: The batch, in the order of ``layout.names``.
        at: Told the name of each stage before it begins.
        watch: Shown the loss of each pass before it is differentiated.
        draws: Where random numbers come from; None: torch's generators.
        stages: Gets gradients and perturbations by name, as `perturbed_passes` has them.
        started: 0 before the first update, where that is a special one, for the base optimizer
            or for the SAM variant.
        memory: What the SAM variant keeps, by parameter name and key.
        perturbed: Whether this is a step of SAM, or one between those of periodic SAM.
        starts_specially: Whether it is the base optimizer that wants ``started``; see
            `apply_update`.
        scaler: The scale of the loss, and how it goes on.

    Returns:
        Both passes (losses, norms, new buffers), the new parameters and the new slots. They
        hold the update whether or not ``passes.finite``: what to do then is the caller's part.
    """
    groups = groups_with(step, hyper)
    objectives = watched_objectives(step, layout, values, watch)
    begin = told(at, draws)
    with torch.no_grad(), draws or contextlib.nullcontext():
        if perturbed:
            passes = perturbed_passes(
                objectives, parameters, buffers, groups, list(hyper["rho"].unbind()),
                step.semantics, at=begin, stages=stages, kind=step.optimizer.kind,
                memory=memory or {}, started=started, scaler=scaler,
            )  # fmt: skip
        else:
            passes = one_pass(
                objectives, parameters, buffers, groups, step.semantics,
                at=begin, kind=step.optimizer.kind, memory=memory or {}, scaler=scaler,
            )  # fmt: skip
        begin("update")
        updated, new_slots = base_update(
            step, groups, parameters, passes.gradients, slots, hyper,
            started if starts_specially else None,
        )  # fmt: skip
    return passes, updated, new_slots


def groups_with(step: TrainStep, hyper: Mapping[str, Tensor]) -> list[Group]:
    """The parameter groups; their weight decay is that of ``hyper``, where it is one of these."""
    groups = step.groups()
    if "weight_decay" in hyper:
        decays = hyper["weight_decay"].unbind()
        groups = [replace(g, weight_decay=d) for g, d in zip(groups, decays, strict=True)]
    return groups


def watched_objectives(
    step: TrainStep,
    layout: BatchLayout,
    values: Sequence[Tensor],
    watch: Callable[[Tensor], None],
) -> Parts:
    """The loss of each part of a batch, in order; ``watch`` is shown each loss."""

    def watched(objective: Objective) -> Objective:
        def evaluate(
            parameters: Mapping[str, Tensor],
            buffers: Mapping[str, Tensor],
            use: Callable[[Tensor, Any], Any],
        ) -> Any:
            def use_watched(loss: Tensor, outputs: Any) -> Any:
                watch(loss)
                return use(loss, outputs)

            return objective(parameters, buffers, use_watched)

        return evaluate

    return step.objectives(layout, values, watched, in_order=True)


def told(at: Callable[[str], None], draws: Draws | None) -> Callable[[str], None]:
    """Tells the name of a stage to ``at`` and to where random numbers come from."""

    def begin(stage: str) -> None:
        at(stage)
        if draws is not None:
            draws.at(stage)

    return begin


def base_update(
    step: TrainStep,
    groups: Sequence[Group],
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    slots: Slots,
    hyper: Mapping[str, Tensor],
    started: Tensor | None,
) -> tuple[dict[str, Tensor], Slots]:
    """The base optimizer's update: new parameters and slots; see `apply_update`.

    Args:
        step: Whose base optimizer.
        groups: Names of the trained parameters.
        parameters: All parameters by name.
        gradients: What the optimizer gets, by parameter name.
        slots: Its state by parameter name and slot key.
        hyper: As in `pure_step`.
        started: 0 before the first update, where that is a special one for the optimizer.
    """
    names = [list(group.names) for group in groups]
    own = {name: value for name, value in hyper.items() if name != "rho"}
    return apply_update(
        step.optimizer.base_optimizer,
        {name: parameters[name] for part in names for name in part},
        gradients,
        slots,
        names,
        [
            {group_key(step.optimizer, name): value[i] for name, value in own.items()}
            for i in range(len(groups))
        ],
        started,
    )
