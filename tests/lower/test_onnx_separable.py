"""Average pooling and interpolation: every option, forward and backward, against ATen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.lower.onnx_cases import Case, check, every_dtype, randn

aten = torch.ops.aten

# image, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
AVG_POOLS: dict[str, tuple[Any, ...]] = {
    "2x2": ((6, 8), (2, 2), (2, 2), (0, 0), False, True, None),
    "default stride": ((6, 8), (3, 2), (), (0, 0), False, True, None),
    "overlapping, padded": ((9, 7), (3, 3), (2, 2), (1, 1), False, True, None),
    "padding does not count": ((9, 7), (3, 3), (2, 1), (1, 1), False, False, None),
    "ceil": ((8, 7), (3, 2), (2, 3), (1, 0), True, True, None),
    "ceil, padding does not count": ((8, 6), (3, 3), (2, 2), (1, 1), True, False, None),
    "ceil, last window in the padding": ((4, 5), (2, 2), (3, 3), (1, 1), True, True, None),
    "divisor": ((9, 7), (3, 3), (2, 2), (1, 1), True, True, 5),
    "whole image": ((4, 4), (4, 4), (4, 4), (0, 0), False, True, None),
    "3d": ((5, 4, 6), (2, 3, 2), (2, 1, 2), (1, 1, 0), True, False, None),
    "3d, divisor": ((5, 4, 6), (2, 3, 2), (1, 2, 2), (0, 1, 1), False, True, 7),
}


def avg_pool_case(name: str, dtype: torch.dtype) -> Case:
    image, *options = AVG_POOLS[name]
    if len(image) == 2:
        forward, backward = aten.avg_pool2d, aten.avg_pool2d_backward
    else:
        forward, backward = aten.avg_pool3d, aten.avg_pool3d_backward
    x = randn(3, 4, *image).to(dtype)
    dy = randn(*forward(x, *options).shape, seed=1).to(dtype)

    def both(x: Tensor, dy: Tensor) -> Any:
        return forward(x, *options), backward(dy, x, *options)

    return both, (x, dy)


@every_dtype
def test_avg_pool(dtype: torch.dtype) -> None:
    check(**{name: avg_pool_case(name, dtype) for name in AVG_POOLS})


@every_dtype
def test_adaptive_avg_pool(dtype: torch.dtype) -> None:
    cases: dict[str, Case] = {}
    for image, counts in (((7, 5), (3, 2)), ((4, 6), (1, 1)), ((4, 6), (8, 6)), ((4, 5, 6),) * 2):
        counts = tuple(max(1, count - 1) for count in counts) if len(image) == 3 else counts
        if len(image) == 2:
            forward, backward = aten._adaptive_avg_pool2d, aten._adaptive_avg_pool2d_backward
        else:
            forward, backward = aten._adaptive_avg_pool3d, aten._adaptive_avg_pool3d_backward
        x, dy = randn(3, 4, *image).to(dtype), randn(3, 4, *counts, seed=1).to(dtype)
        cases[f"{image} to {counts}"] = (
            lambda x, dy, f=forward, b=backward, c=counts: (f(x, c), b(dy, x)),
            (x, dy),
        )
    check(**cases)


# operator, image, result, other arguments
UPSAMPLES: dict[str, tuple[Any, ...]] = {
    "nearest 1d": (aten.upsample_nearest1d, (5,), (12,), ()),
    "nearest, twice": (aten.upsample_nearest2d, (4, 3), (8, 6), (2.0, 2.0)),
    "nearest, down": (aten.upsample_nearest2d, (7, 6), (3, 5), ()),
    "nearest, by a given scale": (aten.upsample_nearest2d, (5, 4), (7, 9), (1.5, 2.3)),
    "nearest exact": (aten._upsample_nearest_exact2d, (5, 4), (7, 9), ()),
    "nearest exact 1d": (aten._upsample_nearest_exact1d, (5,), (7,), ()),
    "nearest exact 3d": (aten._upsample_nearest_exact3d, (2, 3, 4), (4, 5, 6), ()),
    "nearest 3d": (aten.upsample_nearest3d, (2, 3, 4), (4, 5, 6), ()),
    "linear": (aten.upsample_linear1d, (5,), (12,), (False,)),
    "bilinear": (aten.upsample_bilinear2d, (4, 3), (8, 7), (False,)),
    "bilinear, corners": (aten.upsample_bilinear2d, (4, 3), (8, 7), (True,)),
    "bilinear, by a given scale": (aten.upsample_bilinear2d, (4, 3), (7, 8), (False, 1.9, 2.7)),
    "bilinear, down": (aten.upsample_bilinear2d, (9, 8), (4, 3), (False,)),
    "bicubic": (aten.upsample_bicubic2d, (6, 5), (9, 13), (False,)),
    "bicubic, corners": (aten.upsample_bicubic2d, (6, 5), (9, 4), (True,)),
    "trilinear": (aten.upsample_trilinear3d, (2, 3, 4), (4, 5, 6), (False,)),
    "bilinear, antialias": (aten._upsample_bilinear2d_aa, (9, 8), (4, 3), (False,)),
    "bicubic, antialias": (aten._upsample_bicubic2d_aa, (9, 8), (4, 11), (False,)),
}


def upsample_case(name: str, dtype: torch.dtype) -> Case:
    forward, image, result, options = UPSAMPLES[name]
    backward = getattr(aten, f"{forward.__name__}_backward")
    x, dy = randn(2, 3, *image).to(dtype), randn(2, 3, *result, seed=1).to(dtype)

    def both(x: Tensor, dy: Tensor) -> Any:
        return forward(x, result, *options), backward(dy, result, x.shape, *options)

    return both, (x, dy)


@every_dtype
def test_upsample(dtype: torch.dtype) -> None:
    check(**{name: upsample_case(name, dtype) for name in UPSAMPLES})
