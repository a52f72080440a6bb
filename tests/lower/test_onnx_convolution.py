"""Convolutions and their gradients in ONNX against ATen: every form that sizes can choose.

Sizes differ in every dimension, a stride does not divide the image, the last tile of a Winograd
convolution is cut: so that a wrong formula shows.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from sam_export.lower.onnx_ops import winograd
from tests.lower.onnx_cases import Case, check, every_dtype, randn, run_onnx

aten = torch.ops.aten

# x, w, stride, padding, dilation, and where it is not 1: groups
CONVOLUTIONS: dict[str, tuple[Any, ...]] = {
    "3x3": ((4, 3, 9, 7), (5, 3, 3, 3), (1, 1), (1, 1), (1, 1)),
    "stride": ((4, 3, 9, 8), (5, 3, 3, 3), (2, 2), (1, 1), (1, 1)),
    "stride with a rest": ((2, 3, 10, 11), (4, 3, 3, 2), (3, 2), (0, 1), (1, 1)),
    "dilation": ((2, 3, 11, 9), (4, 3, 3, 3), (1, 1), (2, 2), (2, 2)),
    "stride and dilation": ((2, 3, 13, 11), (4, 3, 3, 2), (2, 3), (1, 0), (2, 3)),
    "1x1": ((4, 6, 5, 5), (3, 6, 1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1 stride": ((4, 6, 6, 5), (3, 6, 1, 1), (2, 2), (0, 0), (1, 1)),
    "large padding": ((2, 3, 5, 5), (4, 3, 3, 3), (1, 1), (3, 4), (1, 1)),
    "1x1, more pixels": ((2, 17, 9, 8), (5, 17, 1, 1), (1, 1), (0, 0), (1, 1)),
    "many channels": ((3, 17, 6, 7), (5, 17, 3, 2), (2, 1), (1, 1), (1, 1)),
    "to more channels": ((2, 18, 17, 16), (19, 18, 3, 2), (1, 1), (1, 0), (1, 2)),
    "to fewer channels": ((2, 19, 17, 16), (4, 19, 3, 2), (1, 1), (1, 0), (1, 2)),
    "padding beyond the kernel": ((2, 19, 16, 9), (4, 19, 3, 3), (1, 1), (3, 1), (1, 1)),
    "few channels of many pixels": ((2, 8, 20, 18), (4, 8, 3, 3), (1, 1), (1, 1), (1, 1)),
    "winograd": ((32, 18, 4, 4), (17, 18, 3, 3), (1, 1), (1, 1), (1, 1)),
    "winograd, odd": ((22, 24, 6, 3), (26, 24, 3, 3), (1, 1), (1, 2), (1, 1)),
    "winograd, 2x2": ((130, 12, 2, 2), (19, 12, 3, 3), (1, 1), (1, 1), (1, 1)),
    "winograd, no padding": ((40, 21, 5, 5), (20, 21, 3, 3), (1, 1), (0, 0), (1, 1)),
    "many pixels": ((2, 3, 20, 18), (4, 3, 3, 3), (1, 1), (1, 1), (1, 1)),
    "many pixels, stride": ((2, 3, 40, 37), (4, 3, 5, 3), (2, 2), (2, 1), (1, 1)),
    "1d": ((3, 4, 17), (5, 4, 3), (2,), (1,), (1,)),
    "3d": ((2, 3, 6, 5, 4), (4, 3, 3, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1)),
    "groups": ((2, 6, 9, 7), (4, 3, 3, 3), (1, 1), (1, 1), (1, 1), 2),
    "groups, tiny": ((2, 6, 4, 3), (4, 3, 3, 2), (1, 1), (1, 0), (1, 1), 2),
    "groups, many pixels": ((2, 4, 20, 18), (6, 2, 3, 3), (2, 1), (1, 2), (1, 2), 2),
    "depthwise": ((2, 4, 9, 7), (4, 1, 3, 3), (1, 1), (1, 1), (1, 1), 4),
    "depthwise, multiplier and stride": ((2, 3, 9, 8), (6, 1, 3, 3), (2, 2), (1, 1), (1, 1), 3),
    "depthwise 1d": ((3, 4, 17), (4, 1, 5), (1,), (2,), (1,), 4),
}
# x, w [in, out / groups, ...], stride, padding, dilation, groups, output_padding
TRANSPOSED: dict[str, tuple[Any, ...]] = {
    "2x2 up": ((2, 4, 5, 3), (4, 3, 2, 2), (2, 2), (0, 0), (1, 1), 1, (0, 0)),
    "rest": ((2, 4, 5, 3), (4, 3, 3, 3), (2, 3), (1, 0), (1, 1), 1, (1, 2)),
    "stride 1": ((2, 4, 5, 3), (4, 3, 3, 2), (1, 1), (1, 0), (1, 2), 1, (0, 0)),
    "winograd": ((32, 18, 4, 4), (18, 17, 3, 3), (1, 1), (1, 1), (1, 1), 1, (0, 0)),
    "many pixels, stride 1": ((2, 4, 9, 11), (4, 5, 3, 2), (1, 1), (1, 0), (1, 2), 1, (0, 0)),
    "groups": ((2, 4, 5, 3), (4, 3, 3, 2), (2, 2), (1, 0), (1, 1), 2, (1, 0)),
    "many pixels": ((2, 3, 18, 17), (3, 2, 3, 3), (1, 2), (1, 1), (1, 1), 1, (0, 1)),
    "rest as large as the stride": ((2, 4, 5, 3), (4, 3, 3, 2), (1, 2), (1, 0), (2, 3), 1, (1, 2)),
    "1d": ((3, 4, 9), (4, 2, 3), (2,), (1,), (1,), 1, (1,)),
    "3d": ((2, 3, 3, 4, 2), (3, 2, 2, 3, 2), (1, 2, 1), (0, 1, 0), (1, 1, 1), 1, (0, 1, 0)),
}


def convolution_case(name: str, dtype: torch.dtype) -> Case:
    x_shape, w_shape, stride, padding, dilation, *groups = CONVOLUTIONS[name]
    x, w = randn(*x_shape).to(dtype), randn(*w_shape, seed=1).to(dtype)
    b = randn(w_shape[0], seed=2).to(dtype)
    zeros = [0] * len(stride)

    def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return aten.convolution(x, w, b, stride, padding, dilation, False, zeros, *groups or [1])

    return forward, (x, w, b)


def convolution_backward_case(name: str, dtype: torch.dtype) -> Case:
    forward, (x, w, b) = convolution_case(name, dtype)
    _, _, stride, padding, dilation, *groups = CONVOLUTIONS[name]
    dy = randn(*forward(x, w, b).shape, seed=3).to(dtype)

    def backward(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        zeros, sizes, mask = [0] * len(stride), [w.shape[0]], [True, True, True]
        return aten.convolution_backward(
            dy, x, w, sizes, stride, padding, dilation, False, zeros, *groups or [1], mask
        )

    return backward, (dy, x, w)


def transposed_case(name: str, dtype: torch.dtype) -> Case:
    x_shape, w_shape, stride, padding, dilation, groups, rest = TRANSPOSED[name]
    x, w = randn(*x_shape).to(dtype), randn(*w_shape, seed=1).to(dtype)
    b = randn(w_shape[1] * groups, seed=2).to(dtype)
    options = (stride, padding, dilation, True, rest, groups)
    dy = randn(*aten.convolution(x, w, b, *options).shape, seed=3).to(dtype)

    def both(x: Tensor, w: Tensor, b: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        y = aten.convolution(x, w, b, *options)
        gradients = aten.convolution_backward(dy, x, w, list(b.shape), *options, [True] * 3)
        return y, *gradients

    return both, (x, w, b, dy)


@every_dtype
def test_convolution(dtype: torch.dtype) -> None:
    check(**{name: convolution_case(name, dtype) for name in CONVOLUTIONS})


@every_dtype
def test_convolution_backward(dtype: torch.dtype) -> None:
    check(**{name: convolution_backward_case(name, dtype) for name in CONVOLUTIONS})


@every_dtype
def test_transposed_convolution_and_its_gradient(dtype: torch.dtype) -> None:
    check(**{name: transposed_case(name, dtype) for name in TRANSPOSED})


def fits(name: str, dtype: ir.DataType = ir.DataType.FLOAT) -> bool:
    (batch, _, *window), kernel, stride, padding, dilation, *groups = CONVOLUTIONS[name]
    others = [*stride, *dilation, *groups]
    return winograd.fits(dtype, kernel, batch, window, padding, others)


def test_the_cases_named_so_are_winograds() -> None:
    named = {name for name in CONVOLUTIONS if name.startswith("winograd")}
    assert {name for name in CONVOLUTIONS if fits(name)} == named
    assert not any(fits(name, ir.DataType.DOUBLE) for name in named)


def test_a_sum_without_terms_is_exactly_zero() -> None:
    """Of sparse images, as ReLU makes them, a rounding residue is no gradient.

    Adam divides by the size of a gradient: in its first step 1e-8 counts for as much as 1.
    """
    names = [*(name for name in CONVOLUTIONS if fits(name)), "many channels"]
    cases = {name: sparse_case(name) for name in names}
    for (name, (function, inputs)), results in zip(
        cases.items(), run_onnx(list(cases.values())), strict=True
    ):
        terms = function(*((tensor != 0).float() for tensor in inputs))
        for output, (result, count) in enumerate(zip(results, terms, strict=True)):
            empty = count == 0
            assert empty.any(), (name, output)
            assert not result[empty].any(), (name, output)


def sparse_case(name: str) -> Case:
    """The sums of a convolution and of its gradients, of images with 1 % of their pixels."""
    x_shape, w_shape, stride, padding, dilation, *_ = CONVOLUTIONS[name]
    options = (stride, padding, dilation, False, [0] * len(stride), 1)

    def both(x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        dx, dw, _ = aten.convolution_backward(dy, x, w, None, *options, [True, True, False])
        return aten.convolution(x, w, None, *options), dx, dw

    x, w = randn(*x_shape), randn(*w_shape, seed=1)
    dy = randn(*aten.convolution(x, w, None, *options).shape, seed=2)
    rare = torch.Generator().manual_seed(3)
    x, dy = (t * (torch.rand(t.shape, generator=rare) < 0.01) for t in (x, dy))
    return both, (x, w, dy)
