"""Order statistics: by a stable sort and the place in it."""

from __future__ import annotations

import torch
from torch import Tensor

from sam_export.lower.onnx_ops.table import decomposition


@decomposition("aten::kthvalue")
def kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """aten::kthvalue(Tensor self, SymInt k, int dim=-1, bool keepdim=False) -> (Tensor values,
    Tensor indices)

    Of ties ATen takes any.
    """
    if x.dim() == 0:
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    values, indices = (part.select(dim, k - 1) for part in torch.sort(x, stable=True, dim=dim))
    return (values.unsqueeze(dim), indices.unsqueeze(dim)) if keepdim else (values, indices)


@decomposition("aten::median.dim")
def median_dim(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """aten::median.dim(Tensor self, int dim, bool keepdim=False) -> (Tensor values, Tensor indices)

    The lower one of two middle values; the first NaN, where there is one.
    """
    if x.dim() == 0:
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    values, indices = kthvalue(x, (x.shape[dim] + 1) // 2, dim, keepdim)
    if not x.is_floating_point():
        return values, indices
    nan = x.isnan()
    undefined = nan.any(dim, keepdim)
    first = nan.to(torch.int32).argmax(dim, keepdim)
    return (
        torch.where(undefined, torch.full_like(values, float("nan")), values),
        torch.where(undefined, first, indices),
    )


@decomposition("aten::nanmedian.dim")
def nanmedian_dim(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """aten::nanmedian.dim(Tensor self, int dim, bool keepdim=False) -> (Tensor values, Tensor
    indices)

    The median of the values that are not NaN: these sort before the others, and then among
    themselves. NaN where there are none.
    """
    if x.dim() == 0:
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    if not x.is_floating_point():
        return median_dim(x, dim, keepdim)
    nan = x.isnan()
    first = torch.sort(nan.to(torch.int32), stable=True, dim=dim)[1]
    key = torch.gather(torch.where(nan, torch.full_like(x, float("inf")), x), dim, first)
    places = torch.gather(first, dim, torch.sort(key, stable=True, dim=dim)[1])
    count = nan.logical_not().to(torch.int64).sum(dim, keepdim=True)
    middle = (count - 1).clamp_min(0) // 2
    index = torch.gather(places, dim, middle)
    value = torch.gather(x, dim, index)
    return (value, index) if keepdim else (value.squeeze(dim), index.squeeze(dim))


@decomposition("aten::median")
def median(x: Tensor) -> Tensor:
    """aten::median(Tensor self) -> Tensor"""
    return median_dim(x.reshape(-1), 0)[0]


@decomposition("aten::nanmedian")
def nanmedian(x: Tensor) -> Tensor:
    """aten::nanmedian(Tensor self) -> Tensor"""
    return nanmedian_dim(x.reshape(-1), 0)[0]


@decomposition("aten::mode")
def mode(x: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """aten::mode(Tensor self, int dim=-1, bool keepdim=False) -> (Tensor values, Tensor indices)

    The value that is there most often, of several the smallest; the last place of it.
    """
    if x.dim() == 0:
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    moved = x.movedim(dim, -1)
    equal = moved.unsqueeze(-1) == moved.unsqueeze(-2)
    count = equal.to(torch.int64).sum(-1)
    most = count == count.amax(-1, keepdim=True)
    largest = float("inf") if x.is_floating_point() else torch.iinfo(x.dtype).max
    value = torch.where(most, moved, torch.full_like(moved, largest)).amin(-1, keepdim=True)
    places = torch.arange(x.shape[dim], device=x.device)
    index = torch.where(moved == value, places, -1).amax(-1, keepdim=True)
    value, index = value.movedim(-1, dim), index.movedim(-1, dim)
    return (value, index) if keepdim else (value.squeeze(dim), index.squeeze(dim))
