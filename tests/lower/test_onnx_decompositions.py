"""Operators that are decomposed before they become ONNX, against ATen, with ties and edge cases."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.lower.onnx_cases import Case, check, every_dtype, randn

aten = torch.ops.aten


@every_dtype
def test_diagonals(dtype: torch.dtype) -> None:
    cases: dict[str, Case] = {}
    x = randn(3, 4, 5).to(dtype)
    for offset, dim1, dim2 in ((0, 0, 1), (1, 1, 2), (-2, 1, 2), (2, 2, 0), (-1, -1, 0), (4, 0, 2)):
        options = (offset, dim1, dim2)
        part = torch.diagonal(x, *options).contiguous()
        src = randn(*part.shape, seed=1).to(dtype)
        cases[f"scatter {options}"] = (
            lambda x, src, o=options: aten.diagonal_scatter(x, src, *o),
            (x, src),
        )
        cases[f"backward {options}"] = (
            lambda src, o=options: aten.diagonal_backward(src, [3, 4, 5], *o),
            (src,),
        )
    check(**cases)


@every_dtype
def test_running_maxima_and_order_statistics(dtype: torch.dtype) -> None:
    cases: dict[str, Case] = {}
    x = (randn(3, 7, 4) * 2).round().to(dtype)  # ties
    distinct = randn(3, 7, 4).to(dtype)
    for dim in (0, 1, -1):
        cases[f"cummax {dim}"] = lambda x, d=dim: aten.cummax(x, d), (x,)
        cases[f"cummin {dim}"] = lambda x, d=dim: aten.cummin(x, d), (x,)
        cases[f"kthvalue {dim}"] = lambda x, d=dim: aten.kthvalue(x, 2, d), (distinct,)
    cases["kthvalue keepdim"] = lambda x: aten.kthvalue(x, 3, 1, True), (distinct,)
    cases["cummax of one"] = lambda x: aten.cummax(x, 0), (x[0, 0, 0],)
    check(**cases)


@every_dtype
def test_cdist_and_its_gradient(dtype: torch.dtype) -> None:
    """With two points in one place, where the distance has no gradient."""
    cases: dict[str, Case] = {}
    x, y = randn(2, 4, 3).to(dtype), randn(2, 5, 3, seed=1).to(dtype)
    y[:, 2] = x[:, 1]
    y[:, 3, 0] = x[:, 0, 0]
    grad = randn(2, 4, 5, seed=2).to(dtype)
    for p in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf):

        def both(x: Tensor, y: Tensor, grad: Tensor, p: float = p) -> tuple[Tensor, Tensor]:
            distance = aten._cdist_forward(x, y, p, None)
            return distance, aten._cdist_backward(grad, x, y, p, distance)

        cases[f"p = {p}"] = both, (x, y, grad)
    check(**cases)


@every_dtype
def test_fmax_and_fmin(dtype: torch.dtype) -> None:
    x, y = randn(6).to(dtype), randn(6, seed=1).to(dtype)
    x[1] = y[2] = math.nan
    check(
        fmax=(lambda x, y: aten.fmax(x, y), (x, y)),
        fmin=(lambda x, y: aten.fmin(x, y), (x, y)),
        broadcast=(lambda x, y: aten.fmax(x, y[0]), (x, y)),
    )
