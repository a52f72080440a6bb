"""Gradients of losses."""

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
