"""The three stages of a step, each a pure function, so that others can stand between them.

A pipeline that accumulates over several batches, or averages between machines, puts means of
gradients where the step has its own. One after the other, with nothing in between, the stages are
the step of `step.pure`.

What is not finite tells of itself. The step that is one graph looks at both losses and both norms;
here a gradient goes through other hands first, and a flag beside it would have to go, too. So a
stage whose loss or norm is not finite returns a gradient with NaN in one tensor: in every mean that
it is part of it stays NaN, on every machine, and ``update`` sees it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sam_export.errors import StepConfigError
from sam_export.step.batch import BatchLayout
from sam_export.step.draws import Draws
from sam_export.step.gradient import mean_gradient
from sam_export.step.loss_scaling import Scaler
from sam_export.step.moves import first_move, with_decay
from sam_export.step.norms import global_norm
from sam_export.step.passes import clipped
from sam_export.step.pure import base_update, groups_with, told, watched_objectives
from sam_export.step.update import Slots
from sam_export.step.variants.variant import Memory, Variant

if TYPE_CHECKING:
    from sam_export.step.train_step import TrainStep


@dataclass(frozen=True)
class Ascent:
    """What the first stage gives.

    Attributes:
        loss: Scalar loss at ``w``.
        gradients: ``g`` by parameter name.
        buffers: New buffers by name.
        outputs: The model's output at ``w``.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    outputs: Any


@dataclass(frozen=True)
class Descent:
    """What the second stage gives.

    Attributes:
        perturbed_loss: Scalar loss at ``w + eps_w``.
        grad_norm: Global L2 norm of the gradient at ``w`` that it was given.
        perturbation_norm: Global L2 norm of ``eps_w``.
        gradients: ``g_adv`` by parameter name.
        buffers: New buffers by name; those given, unless this pass updates them, too.
    """

    perturbed_loss: Tensor
    grad_norm: Tensor
    perturbation_norm: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """What the last stage gives.

    Attributes:
        finite: Scalar bool: the gradients are, and so were both losses and all norms.
        parameters: New values of the trained parameters.
        slots: The base optimizer's new slots.
        memory: What the variant keeps.
        perturbed_grad_norm: Global L2 norm of ``g_adv`` before clipping; None without clipping.
    """

    finite: Tensor
    parameters: dict[str, Tensor]
    slots: Slots
    memory: Memory
    perturbed_grad_norm: Tensor | None


def needs_both_gradients(step: TrainStep) -> bool:
    """Whether ``update`` makes something of the gradient at ``w``, too, as variants of SAM do."""
    return type(step.optimizer.variant) is not Variant


def check_staged(step: TrainStep) -> None:
    """Refuses a step that has no three stages.

    Raises:
        StepConfigError: Saying what to do instead.
    """
    semantics, optimizer = step.semantics, step.optimizer
    if semantics.perturbs_each_part:
        raise StepConfigError(
            "staged=True with perturbation_per='micro_batch': in stages a part is a call of its "
            "own. Capture with micro_batches=1, call ascent and descent once for each part, and "
            "give update the mean of what the descents returned."
        )
    if optimizer.ascent_steps > 1:
        raise StepConfigError(
            f"staged=True with ascent_steps={optimizer.ascent_steps}: there would be more "
            "gradients in between than the two that stages hand out. Use ascent_steps=1."
        )
    if optimizer.every > 1 and needs_both_gradients(step):
        raise StepConfigError(
            f"staged=True with SAM(every={optimizer.every}, variant={optimizer.variant.name}): "
            "what the variant does between two steps of SAM is no stage. Without a variant, "
            "update(ascent.gradients) is a step of the base optimizer."
        )


def ascent_stage(
    step: TrainStep,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    layout: BatchLayout,
    values: Sequence[Tensor],
    at: Callable[[str], None],
    watch: Callable[[Tensor], None],
    draws: Draws | None,
    scaler: Scaler | None,
) -> Ascent:
    """Loss and gradient of the loss at ``w``. Arguments as in `pure_step`."""
    objectives = watched_objectives(step, layout, values, watch)
    names = [name for group in step.groups() for name in group.names]
    new_buffers = {name: value.clone() for name, value in buffers.items()}
    with torch.no_grad(), draws or contextlib.nullcontext():
        told(at, draws)("ascent")
        loss, gradients, outputs = mean_gradient(objectives, parameters, new_buffers, names, scaler)
        gradients = _marked(step, gradients, torch.isfinite(loss))
    return Ascent(loss, gradients, new_buffers, outputs)


def descent_stage(
    step: TrainStep,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    hyper: Mapping[str, Tensor],
    layout: BatchLayout,
    values: Sequence[Tensor],
    at: Callable[[str], None],
    watch: Callable[[Tensor], None],
    draws: Draws | None,
    scaler: Scaler | None,
    memory: Memory,
    started: Tensor | None,
) -> Descent:
    """Perturbation from a gradient at ``w``, and loss and gradient of the loss at ``w + eps_w``.

    Args:
        step: Model, loss, optimizer and semantics.
        parameters: All parameters by name.
        buffers: All buffers by name, as the first pass left them.
        gradients: ``g`` by parameter name: of `ascent_stage`, or a mean of several.
        hyper: Hyper-parameters; ``rho`` is used, and ``weight_decay`` where it is ascended.
        layout: How the batch is divided.
        values: The batch.
        at: As in `pure_step`, and so for what follows.
        watch: See there.
        draws: See there.
        scaler: See there.
        memory: See there.
        started: See there.
    """
    groups = groups_with(step, hyper)
    objectives = watched_objectives(step, layout, values, watch)
    begin = told(at, draws)
    new_buffers = {name: value.clone() for name, value in buffers.items()}
    with torch.no_grad(), draws or contextlib.nullcontext():
        begin("perturb")
        move = first_move(
            parameters, gradients, groups, list(hyper["rho"].unbind()), step.semantics,
            kind=step.optimizer.kind, memory=memory, started=started,
        )  # fmt: skip
        begin("descent")
        loss, adversarial, _ = mean_gradient(
            objectives, move.parameters, new_buffers, list(gradients), scaler
        )
        begin("check")
        finite = torch.isfinite(loss) & torch.isfinite(move.grad_norm)
        adversarial = _marked(step, adversarial, finite)
    kept = new_buffers if step.semantics.running_stats == "both" else dict(buffers)
    return Descent(loss, move.grad_norm, move.norm, adversarial, kept)


def update_stage(
    step: TrainStep,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    ascended: Mapping[str, Tensor],
    slots: Slots,
    hyper: Mapping[str, Tensor],
    memory: Memory,
    at: Callable[[str], None],
    started: Tensor | None,
    starts_specially: bool,
) -> Update:
    """Clipping and the base optimizer's update with ``g_adv``.

    Args:
        step: Model, optimizer and semantics.
        parameters: All parameters by name.
        gradients: ``g_adv`` by parameter name: of `descent_stage`, or a mean of several.
        ascended: ``g`` by parameter name, where `needs_both_gradients`.
        slots: State of the base optimizer.
        hyper: Hyper-parameters.
        memory: What the variant keeps.
        at: Told the names of the stages.
        started: As in `pure_step`.
        starts_specially: See there.
    """
    groups = groups_with(step, hyper)
    semantics, variant = step.semantics, step.optimizer.variant
    with torch.no_grad():
        at("check")
        final: Mapping[str, Tensor] = gradients
        if needs_both_gradients(step):
            first = with_decay(ascended, parameters, groups, semantics)
            _, memory = variant.ascended(first, memory, started)
            final, memory = variant.descended(first, gradients, memory)
        norm = global_norm(list(final.values()))
        finite = torch.isfinite(norm)
        if needs_both_gradients(step):
            finite = finite & torch.isfinite(global_norm(list(first.values())))
        own_start = started if starts_specially else None
        at("update")
        used = clipped(final, norm, semantics)
        updated, new_slots = base_update(step, groups, parameters, used, slots, hyper, own_start)
    shown = norm if semantics.clips else None
    return Update(finite, updated, new_slots, memory, shown)


def _marked(step: TrainStep, gradients: dict[str, Tensor], finite: Tensor) -> dict[str, Tensor]:
    """The gradients; the smallest tensor of them is NaN where ``finite`` is false.

    With ``on_nonfinite="ignore"`` they are what they are.
    """
    if step.semantics.on_nonfinite == "ignore":
        return gradients
    name = min(gradients, key=lambda name: gradients[name].numel())
    value = gradients[name]
    return {**gradients, name: torch.where(finite, value, torch.full_like(value, math.nan))}
