"""Sums, means and maxima of bags of embedding vectors, and their gradients.

Bag ``b`` holds the positions ``offsets[b] <= i < offsets[b + 1]`` of ``indices``; a position whose
index is ``padding_idx`` does not count::

    y[b] = sum_i s_i W[indices[i]]        or that divided by the number of positions, or the maximum
    dW[indices[i]] += s_i dy[b]           the same divided, or at the place of the maximum

with per-sample weights ``s``, or 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sam_export.lower.onnx_ops.table import decomposition

_SUM, _MEAN, _MAX = 0, 1, 2


def _bags(indices: Tensor, offsets: Tensor) -> Tensor:
    """The bag of every position: the last one that starts at or before it."""
    places = torch.arange(indices.shape[0], device=indices.device)
    return (offsets.unsqueeze(1) <= places).to(torch.int64).sum(0) - 1


def _sizes(bags: Tensor, counts: Tensor, number: int) -> Tensor:
    """How many positions of each bag count."""
    zeros = torch.zeros(number, dtype=torch.int64, device=bags.device)
    return zeros.scatter_add(0, bags, counts.to(torch.int64))


@decomposition("aten::_embedding_bag")
@decomposition("aten::_embedding_bag_forward_only")
def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """aten::_embedding_bag(Tensor weight, Tensor indices, Tensor offsets, bool scale_grad_by_freq,
    int mode, bool sparse, Tensor? per_sample_weights, bool include_last_offset, int padding_idx)
    -> (Tensor, Tensor, Tensor, Tensor)

    Results; the bag of every position (empty for sums); sizes of the bags; for maxima the index
    that each comes from.
    """
    number = offsets.shape[0] - int(include_last_offset)
    bags, counts = _bags(indices, offsets), indices != padding_idx
    size = _sizes(bags, counts, number)
    vectors = weight[indices]
    if per_sample_weights is not None:
        vectors = vectors * per_sample_weights.unsqueeze(1)
    shape = [number, weight.shape[1]]
    if mode != _MAX:
        kept = torch.where(counts.unsqueeze(1), vectors, 0.0)
        result = weight.new_zeros(shape).index_add(0, bags, kept)
        if mode == _SUM:
            return result, bags.new_zeros([0]), size, torch.zeros_like(size)
        result = result / size.clamp_min(1).unsqueeze(1).to(weight.dtype)
        return result, bags, size, torch.zeros_like(size)
    lowest = torch.full_like(vectors, float("-inf"))
    kept = torch.where(counts.unsqueeze(1), vectors, lowest)
    start = torch.full(shape, float("-inf"), dtype=weight.dtype, device=weight.device)
    to_bag = bags.unsqueeze(1).expand(kept.shape)
    largest = start.scatter_reduce(0, to_bag, kept, "amax")
    # The first position of a bag that holds its maximum.
    places = torch.arange(indices.shape[0], device=indices.device).unsqueeze(1).expand(kept.shape)
    last = indices.shape[0] - 1
    hit = torch.where(kept == largest[bags], places, last)
    first = torch.full(shape, last, dtype=torch.int64, device=bags.device)
    first = first.scatter_reduce(0, to_bag, hit, "amin")
    empty = (size == 0).unsqueeze(1)
    return torch.where(empty, 0.0, largest), bags, size, torch.where(empty, -1, indices[first])


@decomposition("aten::_embedding_bag_backward")
def embedding_bag_backward(
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor,
    offset2bag: Tensor,
    bag_size: Tensor,
    maximum_indices: Tensor,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Tensor | None,
    padding_idx: int = -1,
) -> Tensor:
    """aten::_embedding_bag_backward(Tensor grad, Tensor indices, Tensor offsets, Tensor offset2bag,
    Tensor bag_size, Tensor maximum_indices, SymInt num_weights, bool scale_grad_by_freq, int mode,
    bool sparse, Tensor? per_sample_weights, int padding_idx=-1) -> Tensor

    The bags are read from ``offsets``: ATen leaves ``offset2bag`` empty for sums.
    """
    zeros = grad.new_zeros([num_weights, grad.shape[1]])
    if mode == _MAX:
        there = maximum_indices >= 0
        return zeros.scatter_add(0, maximum_indices.clamp_min(0), torch.where(there, grad, 0.0))
    bags, counts = _bags(indices, offsets), indices != padding_idx
    if mode == _MEAN:
        size = _sizes(bags, counts, grad.shape[0])
        grad = grad / size.clamp_min(1).unsqueeze(1).to(grad.dtype)
    share = torch.where(counts, 1.0, 0.0).to(grad.dtype)
    if per_sample_weights is not None:
        share = share * per_sample_weights
    if scale_grad_by_freq:
        share = share / (indices.unsqueeze(1) == indices).to(grad.dtype).sum(1)
    return zeros.index_add(0, indices, grad[bags] * share.unsqueeze(1))


@decomposition("aten::_embedding_bag_per_sample_weights_backward")
def per_sample_weights_backward(
    grad: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    offset2bag: Tensor,
    mode: int,
    padding_idx: int = -1,
) -> Tensor:
    """aten::_embedding_bag_per_sample_weights_backward(Tensor grad, Tensor weight, Tensor indices,
    Tensor offsets, Tensor offset2bag, int mode, int padding_idx=-1) -> Tensor

    ``ds_i = dy[b] . W[indices[i]]``.
    """
    products = (grad[_bags(indices, offsets)] * weight[indices]).sum(1)
    return torch.where(indices != padding_idx, products, 0.0)
