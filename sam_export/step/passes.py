"""The passes of one SAM step, as a function of named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sam_export.artifact.semantics import Semantics
from sam_export.step.gradient import Parts, mean_gradient
from sam_export.step.kind import NOTHING, SAM_ITSELF, Group, Kind
from sam_export.step.loss_scaling import Scaler
from sam_export.step.moves import first_move, perturbed_by, with_decay
from sam_export.step.norms import global_norm, norms_of
from sam_export.step.variants.variant import Memory, Variant


@dataclass(frozen=True)
class Passes:
    """What both passes give to the base optimizer and to the user.

    Attributes:
        loss: Scalar loss at ``w``.
        perturbed_loss: Scalar loss at ``w + eps_w``.
        grad_norm: Global L2 norm of the gradient at ``w``; scalar, at least float32.
        perturbation_norm: Global L2 norm of ``eps_w``; scalar, at least float32.
        finite: Scalar bool: both losses and both gradient norms are finite.
        gradients: ``g_adv`` by parameter name; a parameter that the loss does not use is absent.
        buffers: New buffers by name.
        outputs: The model's output at ``w``, detached.
        perturbed_grad_norm: Global L2 norm of ``g_adv`` before clipping; None without clipping.
        ascended: ``g`` by parameter name, of a part of the batch with a perturbation of its own.
        memory: What the variant keeps, after this step.
    """

    loss: Tensor
    perturbed_loss: Tensor
    grad_norm: Tensor
    perturbation_norm: Tensor
    finite: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    outputs: Any
    perturbed_grad_norm: Tensor | None = None
    ascended: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)


def two_passes(
    objectives: Parts,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    groups: Sequence[Group],
    rho: Sequence[float | Tensor],
    semantics: Semantics,
    at: Callable[[str], None] = lambda stage: None,
    stages: dict[str, Tensor] | None = None,
    kind: Kind = SAM_ITSELF,
    memory: Memory = NOTHING,
    started: Tensor | None = None,
    scaler: Scaler | None = None,
) -> Passes:
    """Gradient at ``w``, perturbation, gradient at ``w + eps_w``; changes none of its arguments.

    In the order of computation, ``i`` over the parameters, ``k(i)`` the group of ``i``::

        loss, g  = value and gradient of the objective at w
        g_i     += weight_decay_k(i) * w_i            # only with semantics.decay_in_ascent
        norm     = sqrt(sum_i ||g_i||^2)              # norm_over="perturbed": i with rho_k(i) != 0
        eps_i    = g_i * (rho_k(i) / (norm + 1e-12))
        perturbed_loss, g_adv = value and gradient of the objective at w + eps
        g_adv_i  = min(max(g_adv_i, -clip_value), clip_value)
        g_adv_i *= min(clip_norm / (sqrt(sum_i ||g_adv_i||^2) + 1e-6), 1)

    A variant may replace ``g`` before the norm, and ``g_adv`` before it is clipped. With
    ``kind.ascent_steps`` of n the lines from ``g`` to ``eps`` are done n times with ``rho / n``,
    each at the point where the last one ended.

    Args:
        objectives: The loss of each part of the batch as a function of parameters and buffers; the
            mean of them is the objective.
        parameters: All parameters by name; those in no group are constants.
        buffers: All buffers by name.
        groups: The parameters to train.
        rho: Radius of each group.
        semantics: Which pass updates the buffers, whether decay is ascended, which norm, clipping.
        at: Told the name of each stage (``ascent``, ``perturb``, ``descent``, ``check``) before it
            begins.
        stages: Gets what is otherwise only on the way, by name: ``g.<parameter>`` (what is
            ascended), ``eps.<parameter>`` (``(w + eps) - w`` as it was computed) and
            ``g_adv.<parameter>``.
        kind: Which SAM it is.
        memory: What ``kind.variant`` keeps.
        started: 0 before the first step, where the variant asks for it.
        scaler: ``g = gradient(loss * scale) * (1 / scale)`` in each pass; None: the gradient.

    Source: Foret et al., 2021, https://arxiv.org/abs/2010.01412, eq. 2 and 3.
    """
    names = [name for group in groups for name in group.names]
    ascent_buffers = {name: value.clone() for name, value in buffers.items()}
    at("ascent")
    loss, gradients, outputs = mean_gradient(objectives, parameters, ascent_buffers, names, scaler)
    at("perturb")
    if kind.ascent_steps > 1:
        rho = [value / kind.ascent_steps for value in rho]
    first = first_move(
        parameters, gradients, groups, rho, semantics, kind=kind, memory=memory, started=started
    )
    perturbed, eps, perturbation_norm = first.parameters, first.eps, first.norm
    gradients, grad_norm, memory = first.gradients, first.grad_norm, first.memory
    if semantics.running_stats == "both":
        descent_buffers = ascent_buffers
    else:
        descent_buffers = {name: value.clone() for name, value in ascent_buffers.items()}
    for _ in range(kind.ascent_steps - 1):
        at("ascent")
        _, further, _ = mean_gradient(objectives, perturbed, descent_buffers, names, scaler)
        at("perturb")
        further = with_decay(further, perturbed, groups, semantics)
        norms = norms_of(list(further.values()))
        length = torch.linalg.vector_norm(norms)
        perturbed, more, _ = perturbed_by(
            perturbed, further, norms, length, groups, rho, semantics, kind
        )
        eps = {name: value + more[name] for name, value in eps.items()}
    if kind.ascent_steps > 1:
        perturbation_norm = global_norm(list(eps.values()))
    if stages is not None:
        for name, direction in first.directions.items():
            stages[f"g.{name}"] = direction
            stages[f"eps.{name}"] = perturbed[name] - parameters[name]

    del first, eps  # eager needs their room
    plain = type(kind.variant).descended is Variant.descended
    if plain and not semantics.perturbs_each_part:
        gradients = {}

    at("descent")
    perturbed_loss, adversarial, _ = mean_gradient(
        objectives, perturbed, descent_buffers, names, scaler
    )
    if stages is not None:
        stages |= {f"g_adv.{name}": gradient for name, gradient in adversarial.items()}
    at("check")
    final, memory = kind.variant.descended(gradients, adversarial, memory)
    descent_norm = global_norm(list(final.values()))
    finite = (
        torch.isfinite(loss)
        & torch.isfinite(perturbed_loss)
        & torch.isfinite(grad_norm)
        & torch.isfinite(descent_norm)
    )
    return Passes(
        loss=loss,
        perturbed_loss=perturbed_loss,
        grad_norm=grad_norm,
        perturbation_norm=perturbation_norm.to(grad_norm.dtype),
        finite=finite,
        gradients=clipped(final, descent_norm, semantics),
        buffers=ascent_buffers,
        outputs=outputs,
        perturbed_grad_norm=descent_norm if semantics.clips else None,
        ascended=gradients,
        memory=memory,
    )


def one_pass(
    objectives: Parts,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    groups: Sequence[Group],
    semantics: Semantics,
    at: Callable[[str], None] = lambda stage: None,
    kind: Kind = SAM_ITSELF,
    memory: Memory = NOTHING,
    scaler: Scaler | None = None,
) -> Passes:
    """The pass of a step without a perturbation, between those of periodic SAM.

    What it gives has the same fields: the perturbed loss is the loss, since ``eps_w`` is 0. The
    gradient may be changed by a variant (LookSAM), and is then clipped as ``g_adv`` is.

    Args:
        objectives: The loss of each part of the batch as a function of parameters and buffers; the
            mean of them is the objective.
        parameters: All parameters by name; those in no group are constants.
        buffers: All buffers by name.
        groups: The parameters to train.
        semantics: Clipping.
        at: Told the name of each stage (``ascent``, ``check``) before it begins.
        kind: Which SAM it is.
        memory: What ``kind.variant`` keeps.
        scaler: As in `two_passes`.
    """
    names = [name for group in groups for name in group.names]
    new_buffers = {name: value.clone() for name, value in buffers.items()}
    at("ascent")
    loss, gradients, outputs = mean_gradient(objectives, parameters, new_buffers, names, scaler)
    at("check")
    grad_norm = global_norm(list(gradients.values()))
    final = kind.variant.between(gradients, memory)
    norm = grad_norm if final is gradients else global_norm(list(final.values()))
    return Passes(
        loss=loss,
        perturbed_loss=loss.clone(),
        grad_norm=grad_norm,
        perturbation_norm=grad_norm.clamp(max=0),  # 0, and no constant
        finite=torch.isfinite(loss) & torch.isfinite(grad_norm) & torch.isfinite(norm),
        gradients=clipped(final, norm, semantics),
        buffers=new_buffers,
        outputs=outputs,
        perturbed_grad_norm=norm.clone() if semantics.clips else None,
        memory=memory,
    )


def clipped(
    gradients: Mapping[str, Tensor], norm: Tensor, semantics: Semantics
) -> dict[str, Tensor]:
    """By value, then by norm, as `torch.nn.utils` does each; ``norm`` is that of ``gradients``."""
    result = dict(gradients)
    if (bound := semantics.clip_value) is not None:
        result = {name: value.clamp(-bound, bound) for name, value in result.items()}
        norm = global_norm(list(result.values()))
    if semantics.clip_norm is not None:
        factor = (semantics.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        result = {name: value * factor.to(value) for name, value in result.items()}
    return result
