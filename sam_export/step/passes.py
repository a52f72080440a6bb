"""The two passes of one SAM step, as a function of named tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sam_export.artifact.semantics import Semantics
from sam_export.step.loss_scaling import Scaler

EPSILON = 1e-12
"""Added to the gradient norm, so that a gradient of zero gives a perturbation of zero."""

Objective = Callable[
    [Mapping[str, Tensor], Mapping[str, Tensor], Callable[[Tensor, Any], Any]], Any
]
"""(parameters, buffers, use) -> ``use(scalar loss, model output)`` on one batch, called while the
model has these tensors; may update the buffers."""


Perturb = Callable[
    [Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Any]], Mapping[str, Tensor]
]
"""(parameters, gradients, radii) -> ``eps``, by name."""


@dataclass(frozen=True)
class Group:
    """One parameter group: names of its parameters and its weight decay."""

    names: tuple[str, ...]
    weight_decay: float | Tensor = 0.0


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


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    r"""One L2 norm over all gradients: ``sqrt(sum_i ||g_i||_2^2)``.

    Accumulated in at least float32, gathered on the device of the first gradient.

    Args:
        grads: Tensors of any shapes, floating dtypes and devices.

    Returns:
        A scalar; its dtype is the widest of the gradients' and float32.
    """
    norm: Tensor = torch.linalg.vector_norm(_norms(grads))
    return norm


def _norms(grads: Sequence[Tensor]) -> Tensor:
    dtype = functools.reduce(torch.promote_types, (g.dtype for g in grads), torch.float32)
    return torch.stack(
        [torch.linalg.vector_norm(g, dtype=dtype).to(grads[0].device) for g in grads]
    )


def two_passes(
    objective: Objective,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    groups: Sequence[Group],
    rho: Sequence[float | Tensor],
    semantics: Semantics,
    at: Callable[[str], None] = lambda stage: None,
    stages: dict[str, Tensor] | None = None,
    perturb: Perturb | None = None,
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

    Args:
        objective: The loss of one batch as a function of parameters and buffers.
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
        perturb: Another ``eps``: a function of parameters, gradients and radii, by name.
        scaler: ``g = gradient(loss * scale) * (1 / scale)`` in both passes; None: the gradient.

    Source: Foret et al., 2021, https://arxiv.org/abs/2010.01412, eq. 2 and 3.
    """
    names = [name for group in groups for name in group.names]
    ascent_buffers = {name: value.clone() for name, value in buffers.items()}
    at("ascent")
    loss, gradients, outputs = _gradient(objective, parameters, ascent_buffers, names, scaler)
    at("perturb")
    if semantics.decay_in_ascent:
        for group in groups:
            for name in group.names:
                decay, w = group.weight_decay, parameters[name]
                if name not in gradients:
                    continue
                if isinstance(decay, Tensor):
                    gradients[name] = gradients[name] + w * decay.to(w)
                elif decay:
                    gradients[name] = gradients[name].add(w, alpha=decay)

    norms = _norms(list(gradients.values()))
    grad_norm = torch.linalg.vector_norm(norms)
    radius = {name: value for g, value in zip(groups, rho, strict=True) for name in g.names}
    length = grad_norm
    if semantics.norm_over == "perturbed":
        length = torch.linalg.vector_norm(norms * _has_radius(radius, gradients).to(norms))
    perturbed = dict(parameters)
    if perturb is not None:
        eps = perturb(parameters, gradients, radius)
        perturbed |= {name: parameters[name] + value for name, value in eps.items()}
        perturbation_norm = global_norm(list(eps.values()))
    else:
        scales = [value / (length + EPSILON) for value in rho]
        scale_of = {
            name: scale
            for group, scale in zip(groups, scales, strict=True)
            for name in group.names
            if name in gradients
        }
        for name, gradient in gradients.items():
            perturbed[name] = parameters[name] + gradient * scale_of[name].to(gradient)
        if len(scales) == 1:
            perturbation_norm = scales[0] * length
        else:
            perturbation_norm = torch.linalg.vector_norm(
                norms * torch.stack([scale_of[name] for name in gradients]).to(norms)
            )
    if stages is not None:
        for name, gradient in gradients.items():
            stages[f"g.{name}"] = gradient
            stages[f"eps.{name}"] = perturbed[name] - parameters[name]
    del gradients

    at("descent")
    if semantics.running_stats == "both":
        descent_buffers = ascent_buffers
    else:
        descent_buffers = {name: value.clone() for name, value in ascent_buffers.items()}
    perturbed_loss, gradients, _ = _gradient(objective, perturbed, descent_buffers, names, scaler)
    if stages is not None:
        stages |= {f"g_adv.{name}": gradient for name, gradient in gradients.items()}
    at("check")
    descent_norm = global_norm(list(gradients.values()))
    finite = (
        torch.isfinite(loss)
        & torch.isfinite(perturbed_loss)
        & torch.isfinite(grad_norm)
        & torch.isfinite(descent_norm)
    )
    if semantics.clips:
        gradients = _clipped(gradients, descent_norm, semantics)
    return Passes(
        loss=loss,
        perturbed_loss=perturbed_loss,
        grad_norm=grad_norm,
        perturbation_norm=perturbation_norm.to(grad_norm.dtype),
        finite=finite,
        gradients=gradients,
        buffers=ascent_buffers,
        outputs=outputs,
        perturbed_grad_norm=descent_norm if semantics.clips else None,
    )


def _has_radius(radius: Mapping[str, float | Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """1 for each gradient whose parameter has a radius, else 0; float64."""
    radii = [torch.as_tensor(radius[name], dtype=torch.float64) for name in gradients]
    return (torch.stack(radii) != 0).double()


def _clipped(
    gradients: Mapping[str, Tensor], norm: Tensor, semantics: Semantics
) -> dict[str, Tensor]:
    """By value, then by norm, as `torch.nn.utils` does each; ``norm`` is that of ``gradients``."""
    clipped = dict(gradients)
    if (bound := semantics.clip_value) is not None:
        clipped = {name: value.clamp(-bound, bound) for name, value in clipped.items()}
        norm = global_norm(list(clipped.values()))
    if semantics.clip_norm is not None:
        factor = (semantics.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        clipped = {name: value * factor.to(value) for name, value in clipped.items()}
    return clipped


def _gradient(
    objective: Objective,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    names: Sequence[str],
    scaler: Scaler | None,
) -> tuple[Tensor, dict[str, Tensor], Any]:
    leaves = {name: value.detach() for name, value in parameters.items()}
    for name in names:
        leaves[name].requires_grad_()

    def differentiated(loss: Tensor, outputs: Any) -> tuple[Tensor, Any, Sequence[Any]]:
        wanted = [leaves[name] for name in names]
        scaled = loss if scaler is None else scaler.scaled(loss)
        return loss, outputs, torch.autograd.grad(scaled, wanted, allow_unused=True)

    with torch.enable_grad():
        loss, outputs, gradients = objective(leaves, buffers, differentiated)
    found = {
        name: gradient.detach()
        for name, gradient in zip(names, gradients, strict=True)
        if gradient is not None
    }
    if scaler is not None:
        inverse = scaler.inverse()
        found = {name: gradient * inverse for name, gradient in found.items()}
    return loss.detach(), found, _detached(outputs)


def _detached(outputs: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, outputs)
