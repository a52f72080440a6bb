"""Every ONNX form of ours against PyTorch, operator by operator, in ONNX Runtime.

The oracle is the ATen operator itself. Inputs are chosen so that a wrong formula shows: sizes that
differ in every dimension, a stride that does not divide the image, padding, dilation.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam_export.lower.onnx_ops import FORMS, OWN_DECOMPOSITIONS
from tests.lower.onnx_cases import Case, check, every_dtype, randn
from tests.lower.op_table import TABLE

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
    "groups": ((2, 4, 5, 3), (4, 3, 3, 2), (2, 2), (1, 0), (1, 1), 2, (1, 0)),
    "many pixels": ((2, 3, 18, 17), (3, 2, 3, 3), (1, 2), (1, 1), (1, 1), 1, (0, 1)),
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


def batch_norm_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """The mean is far from zero, so that a variance by E[x^2] - E[x]^2 would show.

    In float32 the offset itself costs digits; there it is a usual one.
    """
    offset = 30.0 if dtype == torch.float64 else 1.0
    names = ("w", "b", "mean", "var")
    vectors = {name: randn(shape[1], seed=i + 1).to(dtype) for i, name in enumerate(names)}
    vectors["var"] = vectors["var"].exp()
    return {"x": (randn(*shape) * 0.1 + offset).to(dtype), "dy": randn(*shape).to(dtype), **vectors}


def in_training(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Any:
    return aten._native_batch_norm_legit_functional(x, w, b, mean, var, True, 0.1, 1e-3)


def training_gradient(dy: Tensor, x: Tensor, w: Tensor, mean: Tensor, var: Tensor) -> Any:
    _, m, s, _, _ = in_training(x, w, w, mean, var)
    mask = [True, True, True]
    return aten.native_batch_norm_backward(dy, x, w, mean, var, m, s, True, 1e-3, mask)


def without_statistics(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return aten._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-3)[0]


def in_evaluation(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return aten._native_batch_norm_legit_no_training(x, w, b, mean, var, 0.1, 1e-3)[0]


def plain_evaluation(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return aten.native_batch_norm(x, w, b, mean, var, False, 0.1, 1e-3)[0]


def fixed_gradient(dy: Tensor, x: Tensor, w: Tensor, mean: Tensor, var: Tensor) -> Any:
    mask = [True, True, True]
    return aten.native_batch_norm_backward(dy, x, w, mean, var, None, None, False, 1e-3, mask)


@every_dtype
def test_batch_norm(dtype: torch.dtype) -> None:
    cases: dict[str, Case] = {}
    for shape in ((6, 5), (6, 5, 7), (3, 4, 5, 6)):
        given = batch_norm_inputs(shape, dtype)
        for function in (
            in_training,
            training_gradient,
            without_statistics,
            in_evaluation,
            plain_evaluation,
            fixed_gradient,
        ):
            names = inspect.signature(function).parameters
            key = f"{function.__name__}, rank {len(shape)}"
            cases[key] = function, [given[name] for name in names]
    check(**cases)


# kernel, stride, padding, dilation, ceil_mode
POOLS = {
    "tiling": ((2, 2), (2, 2), (0, 0), (1, 1), False),
    "tiling 3x4": ((3, 4), (), (0, 0), (1, 1), False),
    "tiling 1x2": ((1, 2), (1, 2), (0, 0), (1, 1), False),
    "2x2": ((2, 2), (2, 2), (0, 0), (1, 1), False),
    "default stride": ((2, 2), (), (0, 0), (1, 1), False),
    "overlapping": ((3, 3), (2, 2), (1, 1), (1, 1), False),
    "stride 1": ((2, 3), (1, 1), (0, 1), (1, 1), False),
    "ceil": ((2, 2), (2, 2), (0, 0), (1, 1), True),
    "dilated": ((2, 2), (2, 2), (0, 0), (2, 2), False),
}


def pool_case(name: str, dtype: torch.dtype) -> Case:
    """Values are rounded and cut at zero, so that windows hold ties."""
    kernel, stride, padding, dilation, ceil = POOLS[name]
    size = (6, 8) if name.startswith("tiling") else (9, 7)
    x = (randn(3, 4, *size) * 2).round().clamp_min(0).to(dtype)
    y, _ = aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil)
    dy = randn(*y.shape, seed=1).to(dtype)

    def both(x: Tensor, dy: Tensor) -> Any:
        y, indices = aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil)
        dx = aten.max_pool2d_with_indices_backward(
            dy, x, kernel, stride, padding, dilation, ceil, indices
        )
        return y, dx

    return both, (x, dy)


@every_dtype
def test_max_pool(dtype: torch.dtype) -> None:
    check(**{name: pool_case(name, dtype) for name in POOLS})


def test_the_index_of_a_maximum_is_torchs() -> None:
    """Where the model itself reads it; within the image of one channel."""
    x, volume = randn(3, 4, 9, 7), randn(2, 3, 4, 6, 5)
    pooled = aten.max_pool2d_with_indices(x, [2, 2])[0]
    check(
        plane=(lambda x: aten.max_pool2d_with_indices(x, [3, 3], [2, 2], [1, 1]), (x,)),
        volume=(lambda x: aten.max_pool3d_with_indices(x, [2, 2, 2]), (volume,)),
        unpooled=(
            lambda x, y: aten.max_unpool2d(y, aten.max_pool2d_with_indices(x, [2, 2])[1], [9, 7]),
            (x, pooled),
        ),
    )


@every_dtype
def test_other_max_pools_and_their_gradients(dtype: torch.dtype) -> None:
    def volume(x: Tensor, dy: Tensor) -> Any:
        options = ([2, 3, 2], [2, 2, 1], [1, 1, 0], [1, 1, 2], False)
        y, indices = aten.max_pool3d_with_indices(x, *options)
        return y, aten.max_pool3d_with_indices_backward(dy, x, *options, indices)

    def given(x: Tensor, dy: Tensor, indices: Tensor) -> Tensor:
        options = ([2, 2], [1, 1], [0, 0], [1, 1], False)
        return aten.max_pool2d_with_indices_backward(dy, x, *options, indices)

    def adaptive(x: Tensor, dy: Tensor) -> Any:
        y, indices = aten.adaptive_max_pool2d(x, [3, 2])
        return y, indices, aten.adaptive_max_pool2d_backward(dy, x, indices)

    def adaptive_volume(x: Tensor, dy: Tensor) -> Any:
        y, indices = aten.adaptive_max_pool3d(x, [3, 2, 4])
        return y, indices, aten.adaptive_max_pool3d_backward(dy, x, indices)

    x = randn(2, 3, 5, 6, 7).to(dtype)
    dy = randn(2, 3, 3, 3, 5, seed=1).to(dtype)
    plane = randn(2, 3, 5, 4).to(dtype)
    y, indices = aten.max_pool2d_with_indices(plane, [2, 2], [1, 1])
    check(
        volume=(volume, (x, dy)),
        given=(given, (plane, randn(*y.shape, seed=1).to(dtype), indices)),
        adaptive=(adaptive, (plane, randn(2, 3, 3, 2, seed=1).to(dtype))),
        adaptive_volume=(adaptive_volume, (x, randn(2, 3, 3, 2, 4, seed=1).to(dtype))),
    )


@every_dtype
def test_threshold_backward(dtype: torch.dtype) -> None:
    x, dy = (randn(5, 40) * 2).round().to(dtype), randn(5, 40, seed=1).to(dtype)
    check(
        at_zero=(lambda dy, x: aten.threshold_backward(dy, x, 0), (dy, x)),
        at_one=(lambda dy, x: aten.threshold_backward(dy, x, 1), (dy, x)),
    )


def cross_entropy_case(
    dtype: torch.dtype, code: int, weighted: bool, shape: tuple[int, ...]
) -> Case:
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, 4, (shape[0], *shape[2:]), generator=generator)
    target.view(-1)[1] = -100
    weight = randn(4, seed=2).exp().to(dtype)
    name = "nll_loss" if len(shape) == 2 else "nll_loss2d"

    def both(x: Tensor, target: Tensor, weight: Tensor) -> Any:
        w = weight if weighted else None
        log_p = torch.log_softmax(x, 1)
        loss, total = getattr(aten, f"{name}_forward")(log_p, target, w, code, -100)
        d_log_p = getattr(aten, f"{name}_backward")(
            torch.ones_like(loss), log_p, target, w, code, -100, total
        )
        dx = aten._log_softmax_backward_data(d_log_p, log_p, 1, x.dtype)
        return loss, dx, weight * 1

    return both, (randn(*shape).to(dtype), target, weight)


@every_dtype
def test_cross_entropy_and_its_gradient(dtype: torch.dtype) -> None:
    """The stock exporter makes every gradient of a mean cross-entropy too large."""
    check(
        **{
            f"{reduction}, weighted {weighted}, {shape}": cross_entropy_case(
                dtype, code, weighted, shape
            )
            for reduction, code in (("mean", 1), ("sum", 2))
            for weighted in (False, True)
            for shape in ((6, 4), (3, 4, 5, 2))
        }
    )


@every_dtype
def test_gelu_and_its_gradient(dtype: torch.dtype) -> None:
    x, grad = (randn(50, seed=seed).to(dtype) * 3 for seed in (0, 1))
    cases: dict[str, Case] = {}
    for approximate in ("none", "tanh"):
        cases[approximate] = lambda x, a=approximate: aten.gelu(x, approximate=a), [x]
        cases[f"gradient, {approximate}"] = (
            lambda g, x, a=approximate: aten.gelu_backward(g, x, approximate=a),
            [grad, x],
        )
    check(**cases)


@every_dtype
def test_layer_norm(dtype: torch.dtype) -> None:
    """All three outputs; with weight and bias, with one of them, with none."""
    cases: dict[str, Case] = {}
    for shape, count in (((6, 5), 1), ((3, 4, 5), 2), ((3, 4, 5), 1)):
        x = (randn(*shape) * 3 + 1).to(dtype)
        w, b = (randn(*shape[-count:], seed=seed).to(dtype) for seed in (1, 2))
        own = list(shape[-count:])
        for name, given in (("both", (w, b)), ("weight", (w, None)), ("none", (None, None))):

            def function(
                x: Tensor,
                *affine: Tensor,
                own: list[int] = own,
                given: tuple[Tensor | None, ...] = given,
            ) -> Any:
                rest = iter(affine)
                w, b = (None if value is None else next(rest) for value in given)
                return aten.native_layer_norm(x, own, w, b, 1e-3)

            key = f"{name}, shape {shape}, last {count}"
            cases[key] = function, [x, *(value for value in given if value is not None)]
    check(**cases)


def test_every_form_is_tested() -> None:
    """In the table, or by name in a file of this folder; gradients by their forward operator."""
    source = "".join(file.read_text() for file in Path(__file__).parent.glob("test_onnx_*.py"))
    tabled = {name for own in TABLE.values() for row in own for name in (*row.covers, row.op)}
    tabled = {re.split(r"[., ]", name)[0] for name in tabled}
    names = {target._schema.name.split("::")[1] for target in {*FORMS, *OWN_DECOMPOSITIONS}}
    untested = [
        name
        for name in sorted(names)
        if not {name, name.removesuffix("_backward")} & tabled
        and f"aten.{name}" not in source
        and f"aten.{name.removesuffix('_backward')}," not in source
    ]
    assert not untested
