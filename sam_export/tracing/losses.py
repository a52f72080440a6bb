"""Losses of `torch.nn` that cannot be traced as they are, or are traced into something else.

- ``gaussian_nll_loss`` looks at its variances, and raises if one is negative.
- ``ctc_loss`` has a result whose size depends on values.
- ``multilabel_margin_loss`` is decomposed by torch 2.13 while it traces, and counts the first class
  once for every label behind the first -1 (`torch._decomp.decompositions`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn._reduction import legacy_get_string
from torch.overrides import TorchFunctionMode

from sam_export.step.mixed_precision import NARROW
from sam_export.tracing.ctc import ctc_losses


class TraceableLosses(TorchFunctionMode):
    """While it is active, these losses are computed as this module has them."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _LOSSES.get(func, func)(*args, **(kwargs or {}))


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _cast_as_by_autocast(value: Tensor) -> Tensor:
    """In float32 under autocast, which casts these losses' inputs up in eager."""
    if torch.is_autocast_enabled(value.device.type) and value.dtype in NARROW:
        return value.float()
    return value


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """``(log(v) + (input - target)^2 / v) / 2`` with ``v = max(var, eps)``; ``full`` adds
    ``log(2 pi) / 2``.

    A negative variance is an error in eager. A graph cannot raise; the loss is then not a number,
    and the step not finite.

    Source: `torch.nn.functional.gaussian_nll_loss`
    """
    v = var if isinstance(var, Tensor) else torch.full_like(input, var)
    if v.shape != input.shape and input.shape[:-1] == v.shape:
        v = v.unsqueeze(-1)
    elif v.shape != input.shape:
        pairs = zip(input.shape, v.shape, strict=False)
        if v.dim() != input.dim() or sum(y for x, y in pairs if x != y) != 1:
            raise ValueError("var is of incorrect size")
    negative = (v.detach() < 0).any()
    v = v.clone()
    with torch.no_grad():
        v.clamp_(min=eps)
    loss = 0.5 * (torch.log(v) + (input - target) ** 2 / v)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return _reduced(loss * torch.where(negative, math.nan, 1.0), reduction)


def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``sum_{k in targets, j not a target} max(0, 1 - x_k + x_j) / C`` of each example.

    The targets are the labels before the first -1.

    Source: `torch.nn.MultiLabelMarginLoss`
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    input = _cast_as_by_autocast(input)
    rows, labels = torch.atleast_2d(input), torch.atleast_2d(target)
    counts = (labels < 0).to(torch.int64).cumsum(1) == 0
    labels = labels.clamp_min(0)
    share = counts.to(rows.dtype)
    targets = torch.zeros_like(rows).scatter_add(1, labels, share).clamp_max(1.0)
    z = 1.0 - rows.gather(1, labels).unsqueeze(2) + rows.unsqueeze(1)  # [row, target, class]
    pairs = share.unsqueeze(2) * (1.0 - targets).unsqueeze(1)
    loss = (z.clamp_min(0) * pairs).sum((1, 2)) / rows.shape[1]
    return _reduced(loss.reshape(input.shape[:-1]), reduction)


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """`tracing.ctc.ctc_losses`; their mean is of each loss by its number of labels.

    Source: `torch.nn.functional.ctc_loss`
    """
    log_probs = _cast_as_by_autocast(log_probs)
    single = log_probs.dim() == 2
    lengths = target_lengths
    if single:
        log_probs, targets = log_probs.unsqueeze(1), targets.unsqueeze(0)
        input_lengths, lengths = _row(input_lengths), _row(target_lengths)
    losses = ctc_losses(log_probs, targets, input_lengths, lengths, blank)
    if zero_infinity:
        losses = torch.where(torch.isinf(losses), 0.0, losses)
    if reduction == "mean":
        count = lengths if isinstance(lengths, Tensor) else torch.tensor(list(lengths))
        return (losses / count.to(losses).clamp_min(1)).mean()
    losses = losses.squeeze(0) if single else losses
    return _reduced(losses, reduction)


def _row(lengths: Any) -> Any:
    return lengths.reshape(1) if isinstance(lengths, Tensor) else [*_flat(lengths)]


def _flat(lengths: Any) -> Sequence[int]:
    return [lengths] if isinstance(lengths, int) else lengths


_LOSSES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.gaussian_nll_loss: gaussian_nll_loss,
    F.multilabel_margin_loss: multilabel_margin_loss,
    F.ctc_loss: ctc_loss,
}
