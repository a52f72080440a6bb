"""Losses that compare every class with every other, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from sam_export.lower.onnx_ops.table import decomposition

_NONE, _MEAN = 0, 1
"""ATen's numbers of ``reduction``; 2 is the sum."""


@decomposition("aten::multi_margin_loss_backward")
def multi_margin_loss_backward(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    p: float,
    margin: float,
    weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    """aten::multi_margin_loss_backward(Tensor grad_output, Tensor self, Tensor target, Scalar p,
    Scalar margin, Tensor? weight=None, int reduction=1) -> Tensor

    Of ``loss = sum_{j != y} w_y max(0, z_j)^p / C`` with ``z_j = margin - x_y + x_j``, for each
    example::

        dx_j = g w_y p max(0, z_j)^(p - 1) [z_j > 0] / C      for j != y
        dx_y = -sum of these
    """
    rows, index = (x, target) if x.dim() == 2 else (x.reshape(1, -1), target.reshape(1))
    index = index.unsqueeze(1)
    count, classes = rows.shape
    z = margin - rows.gather(1, index) + rows
    slope = (z > 0).to(x.dtype) if p == 1 else 2.0 * z.clamp_min(0)
    if weight is not None:
        slope = slope * weight[index.squeeze(1)].unsqueeze(1)
    own = torch.arange(classes, device=x.device) == index
    slope = torch.where(own, 0.0, slope) / classes
    slope = torch.where(own, -slope.sum(1, keepdim=True), slope)
    if reduction == _NONE:
        grad = grad.reshape(-1, 1)
    elif reduction == _MEAN:
        grad = grad / count
    return (grad * slope).reshape(x.shape)


def _labels(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of ``x``, of ``target``, and which of its entries count: those before the first -1."""
    rows, labels = (x, target) if x.dim() == 2 else (x.reshape(1, -1), target.reshape(1, -1))
    counts = (labels < 0).to(torch.int64).cumsum(1) == 0
    return rows, labels.clamp_min(0), counts


@decomposition("aten::multilabel_margin_loss_forward")
def multilabel_margin_loss_forward(
    x: Tensor, target: Tensor, reduction: int
) -> tuple[Tensor, Tensor]:
    """aten::multilabel_margin_loss_forward(Tensor self, Tensor target, int reduction) -> (Tensor
    output, Tensor is_target)

    ``sum_{k in targets, j not a target} max(0, 1 - x_k + x_j) / C`` of each example; and which
    classes are targets.
    """
    rows, labels, counts = _labels(x, target)
    classes = rows.shape[1]
    is_target = _is_target(labels, counts, rows)
    z = 1.0 - rows.gather(1, labels).unsqueeze(2) + rows.unsqueeze(1)  # [row, target, class]
    pairs = counts.unsqueeze(2).to(x.dtype) * (1.0 - is_target).unsqueeze(1)
    loss = (z.clamp_min(0) * pairs).sum((1, 2)) / classes
    if reduction == _MEAN:
        loss = loss.mean()
    elif reduction == _NONE:
        loss = loss.reshape(x.shape[:-1])
    else:
        loss = loss.sum()
    return loss, is_target.reshape(target.shape)


@decomposition("aten::multilabel_margin_loss_backward")
def multilabel_margin_loss_backward(
    grad: Tensor, x: Tensor, target: Tensor, reduction: int, is_target: Tensor
) -> Tensor:
    """aten::multilabel_margin_loss_backward(Tensor grad_output, Tensor self, Tensor target, int
    reduction, Tensor is_target) -> Tensor

    Each pair with ``1 - x_k + x_j > 0`` gives ``+1 / C`` to ``j`` and ``-1 / C`` to ``k``.
    """
    rows, labels, counts = _labels(x, target)
    count, classes = rows.shape
    targets = is_target.reshape(rows.shape).to(x.dtype)
    z = 1.0 - rows.gather(1, labels).unsqueeze(2) + rows.unsqueeze(1)
    active = (z > 0).to(x.dtype) * counts.unsqueeze(2) * (1.0 - targets).unsqueeze(1) / classes
    dx = active.sum(1)
    dx = dx.scatter_add(1, labels, -active.sum(2))
    if reduction == _NONE:
        grad = grad.reshape(-1, 1)
    elif reduction == _MEAN:
        grad = grad / count
    return (grad * dx).reshape(x.shape)


def _is_target(labels: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
    hits = torch.zeros_like(rows).scatter_add(1, labels, counts.to(rows.dtype))
    return (hits > 0).to(rows.dtype)
