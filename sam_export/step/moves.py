"""From the gradient at ``w`` to ``w + eps_w``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sam_export.artifact.semantics import Semantics
from sam_export.step.kind import NOTHING, SAM_ITSELF, Group, Kind
from sam_export.step.norms import EPSILON, global_norm, norms_of
from sam_export.step.variants.variant import Memory


@dataclass(frozen=True)
class Move:
    """The way from ``w`` to ``w + eps_w``.

    Attributes:
        parameters: All parameters, those with a gradient moved.
        eps: ``eps_w`` by parameter name.
        norm: Global L2 norm of ``eps_w``.
        gradients: The gradient at ``w``, with the weight decay's if that is ascended, too.
        grad_norm: Its global L2 norm.
        directions: What is ascended: the gradient, or what the variant makes of it.
        memory: What the variant keeps, after this.
    """

    parameters: dict[str, Tensor]
    eps: dict[str, Tensor]
    norm: Tensor
    gradients: dict[str, Tensor]
    grad_norm: Tensor
    directions: Mapping[str, Tensor]
    memory: Memory


def first_move(
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    groups: Sequence[Group],
    rho: Sequence[float | Tensor],
    semantics: Semantics,
    kind: Kind = SAM_ITSELF,
    memory: Memory = NOTHING,
    started: Tensor | None = None,
) -> Move:
    """From the gradient at ``w`` to ``w + eps_w``: the lines of `passes.two_passes` in between.

    Args:
        parameters: All parameters by name.
        gradients: The gradient of the loss at ``w``, by parameter name.
        groups: The parameters to train.
        rho: Radius of each group.
        semantics: Whether decay is ascended, which norm.
        kind: Which SAM it is.
        memory: What ``kind.variant`` keeps.
        started: As in `passes.two_passes`.
    """
    gradients = with_decay(gradients, parameters, groups, semantics)
    norms = norms_of(list(gradients.values()))
    grad_norm = torch.linalg.vector_norm(norms)
    directions, memory = kind.variant.ascended(gradients, memory, started)
    length = grad_norm
    if directions is not gradients:
        norms = norms_of(list(directions.values()))
        length = torch.linalg.vector_norm(norms)
    perturbed, eps, norm = perturbed_by(
        parameters, directions, norms, length, groups, rho, semantics, kind
    )
    norm = norm.to(grad_norm.dtype)
    return Move(perturbed, eps, norm, gradients, grad_norm, directions, memory)


def with_decay(
    gradients: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    groups: Sequence[Group],
    semantics: Semantics,
) -> dict[str, Tensor]:
    """The gradients, with the weight decay's if it is ascended, too."""
    result = dict(gradients)
    if semantics.decay_in_ascent:
        for group in groups:
            for name in group.names:
                decay, w = group.weight_decay, parameters[name]
                if name not in gradients:
                    continue
                if isinstance(decay, Tensor):
                    result[name] = gradients[name] + w * decay.to(w)
                elif decay:
                    result[name] = gradients[name].add(w, alpha=decay)
    return result


def perturbed_by(
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    norms: Tensor,
    length: Tensor,
    groups: Sequence[Group],
    rho: Sequence[float | Tensor],
    semantics: Semantics,
    kind: Kind,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """All parameters, those with a gradient moved by ``eps``; ``eps``, and its norm.

    ``norms`` are those of the gradients, and ``length`` is that of all.
    """
    radius = {name: value for g, value in zip(groups, rho, strict=True) for name in g.names}
    perturbed = dict(parameters)
    if kind.perturb is not None:
        eps = dict(kind.perturb(parameters, gradients, radius))
        perturbed |= {name: parameters[name] + value for name, value in eps.items()}
        return perturbed, eps, global_norm(list(eps.values()))
    if semantics.norm_over == "perturbed":
        length = torch.linalg.vector_norm(norms * _has_radius(radius, gradients).to(norms))
    scales = [value / (length + EPSILON) for value in rho]
    scale_of = {
        name: scale
        for group, scale in zip(groups, scales, strict=True)
        for name in group.names
        if name in gradients
    }
    eps = {name: g * scale_of[name].to(g) for name, g in gradients.items()}
    perturbed |= {name: parameters[name] + value for name, value in eps.items()}
    if len(scales) == 1:
        return perturbed, eps, scales[0] * length
    chosen = torch.stack([scale_of[name] for name in gradients])
    return perturbed, eps, torch.linalg.vector_norm(norms * chosen.to(norms))


def _has_radius(radius: Mapping[str, float | Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """1 for each gradient whose parameter has a radius, else 0; float64."""
    radii = [torch.as_tensor(radius[name], dtype=torch.float64) for name in gradients]
    return (torch.stack(radii) != 0).double()
