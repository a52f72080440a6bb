"""Variants of the oracle's step. It imports nothing of this package, on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Groups = Sequence[Mapping[str, Any]]
"""Parameter groups of a stock optimizer."""


def other_perturbation(
    model: nn.Module,
    groups: Groups,
    radius: str,
    perturbation: Callable[..., Mapping[str, Tensor]] | None,
    adaptive: float | None,
) -> Mapping[str, Tensor] | None:
    """``eps`` by name, of another kind than SAM's; None where it is SAM's.

    Args:
        model: With gradients.
        groups: Of the optimizer.
        radius: Under which key a group holds its radius.
        perturbation: The user's own function of (parameters, gradients, radii).
        adaptive: For adaptive SAM: its ``eta``. With ``t = |w| + eta``: ``rho t^2 g / ||t g||``.

    Source: Kwon, Kim, Park, Choi, 2021, https://arxiv.org/abs/2102.11600, eq. 11.
    """
    if perturbation is None and adaptive is None:
        return None
    radius_of = {p: group[radius] for group in groups for p in group["params"]}
    held = {
        name: p for name, p in model.named_parameters() if p.grad is not None and p in radius_of
    }
    w = {name: p.detach() for name, p in held.items()}
    g = {name: p.grad for name, p in held.items() if p.grad is not None}
    rho = {name: torch.tensor(radius_of[p], dtype=torch.float64) for name, p in held.items()}
    if perturbation is not None:
        return perturbation(w, g, rho)
    assert adaptive is not None
    t = {name: value.abs() + adaptive for name, value in w.items()}
    norm = torch.cat([(t[name] * g[name]).flatten() for name in held]).norm() + 1e-12
    return {name: rho[name] * t[name] ** 2 * g[name] / norm for name in held}


def clip(groups: Groups, norm: float | None, value: float | None) -> None:
    """Clips the gradients by value, then by their norm, with torch's own functions."""
    held = [p for group in groups for p in group["params"]]
    if value is not None:
        torch.nn.utils.clip_grad_value_(held, value, foreach=False)
    if norm is not None:
        torch.nn.utils.clip_grad_norm_(held, norm, foreach=False)
