"""Every ONNX form of ours against PyTorch, operator by operator, in ONNX Runtime.

The oracle is the ATen operator itself. Inputs are chosen so that a wrong formula shows: sizes that
differ in every dimension, a stride that does not divide the image, padding, dilation.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from sam_export.artifact.contract import ProgramSpec, StepContract, TensorSpec
from sam_export.lower.onnx_graph import onnx_model
from sam_export.lower.onnx_ops import FORMS

aten = torch.ops.aten

# A float32 sum of n products is off by about sqrt(n) * eps; the largest here has n = 2,000.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Case = tuple[Callable[..., Any], Sequence[Tensor]]


def as_list(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def run_onnx(cases: Sequence[Case]) -> list[list[Tensor]]:
    """All cases as one graph: an export costs a second, an operator nothing."""
    inputs = [tensor for _, tensors in cases for tensor in tensors]

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            given = iter(tensors)
            return [
                result
                for function, own in cases
                for result in as_list(function(*(next(given) for _ in own)))
            ]

    names = tuple(f"in{i}" for i in range(len(inputs)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # pytree's, about its own LeafSpec
        program = torch.export.export(Module(), tuple(inputs), strict=False)
        program = program.run_decompositions({})
    expected = [as_list(function(*tensors)) for function, tensors in cases]

    def spec(name: str, tensor: Tensor) -> TensorSpec:
        return TensorSpec(name, "input", str(tensor.dtype).split(".")[1], tuple(tensor.shape))

    batch = tuple(spec(name, tensor) for name, tensor in zip(names, inputs, strict=True))
    flat = [tensor for results in expected for tensor in results]
    outputs = tuple(spec(f"out{i}", tensor) for i, tensor in enumerate(flat))
    step = ProgramSpec("step", names, outputs, {})
    contract = StepContract((), (), batch, "tuple", {}, (step,), "tensor", (), "none")
    model = onnx_model(program, step, contract)
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), disabled_optimizers=["MatmulTransposeFusion"]
    )
    fed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    found = iter(session.run(None, fed))
    return [[torch.from_numpy(next(found)) for _ in results] for results in expected]


def check(**cases: Case) -> None:
    """Every case against the function itself; the message names those that differ."""
    wrong = {}
    found = run_onnx(list(cases.values()))
    for (name, (function, inputs)), results in zip(cases.items(), found, strict=True):
        for index, wanted in enumerate(as_list(function(*inputs))):
            result = results[index]
            assert result.shape == wanted.shape, name
            assert result.dtype == wanted.dtype, name
            scale = float(wanted.double().abs().max()) or 1.0
            error = float((result.double() - wanted.double()).abs().max()) / scale
            dtype = wanted.dtype if wanted.is_floating_point() else torch.float64
            if not error <= TOLERANCE[dtype]:
                wrong[f"{name}, output {index}"] = error
    assert not wrong


# x, w, stride, padding, dilation
CONVOLUTIONS = {
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
}
FLOATS = [torch.float32, torch.float64]


every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def convolution_case(name: str, dtype: torch.dtype) -> Case:
    x_shape, w_shape, stride, padding, dilation = CONVOLUTIONS[name]
    x, w = randn(*x_shape).to(dtype), randn(*w_shape, seed=1).to(dtype)
    b = randn(w_shape[0], seed=2).to(dtype)
    zeros = [0] * len(stride)

    def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return aten.convolution(x, w, b, stride, padding, dilation, False, zeros, 1)

    return forward, (x, w, b)


def convolution_backward_case(name: str, dtype: torch.dtype) -> Case:
    forward, (x, w, b) = convolution_case(name, dtype)
    _, _, stride, padding, dilation = CONVOLUTIONS[name]
    dy = randn(*forward(x, w, b).shape, seed=3).to(dtype)

    def backward(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        zeros, sizes, mask = [0] * len(stride), [w.shape[0]], [True, True, True]
        return aten.convolution_backward(
            dy, x, w, sizes, stride, padding, dilation, False, zeros, 1, mask
        )

    return backward, (dy, x, w)


@every_dtype
def test_convolution(dtype: torch.dtype) -> None:
    check(**{name: convolution_case(name, dtype) for name in CONVOLUTIONS})


@every_dtype
def test_convolution_backward(dtype: torch.dtype) -> None:
    check(**{name: convolution_backward_case(name, dtype) for name in CONVOLUTIONS})


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


# One third has no exact float32: a number that goes through float32 is 1e-8 off in float64.
THIRD = 1 / 3
ARITHMETIC: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "aten.add": lambda x, y, s: aten.add.Tensor(x, y, alpha=THIRD),
    "aten.add number": lambda x, y, s: aten.add.Tensor(x, THIRD, alpha=THIRD),
    "aten.add scalar": lambda x, y, s: aten.add.Tensor(s, y, alpha=THIRD),
    "aten.add float64 scalar": lambda x, y, s: aten.add.Tensor(x, s.double()),
    "aten.add bool": lambda x, y, s: aten.add.Tensor(x > 0, y > 0),
    "aten.sub": lambda x, y, s: aten.sub.Tensor(x, y, alpha=THIRD),
    "aten.rsub": lambda x, y, s: aten.rsub.Scalar(x, THIRD, THIRD),
    "aten.rsub tensor": lambda x, y, s: aten.rsub.Tensor(x, y, alpha=THIRD),
    "aten.mul": lambda x, y, s: aten.mul.Tensor(x, y),
    "aten.mul number": lambda x, y, s: aten.mul.Tensor(x, THIRD),
    "aten.mul bool": lambda x, y, s: aten.mul.Tensor(x > 0, y > 0),
    "aten.mul integer": lambda x, y, s: aten.mul.Tensor(x.long(), THIRD),
    "aten.div": lambda x, y, s: aten.div.Tensor(x, y),
    "aten.div number": lambda x, y, s: aten.div.Tensor(x, THIRD),
    "aten.pow": lambda x, y, s: aten.pow.Tensor_Scalar(x.abs(), THIRD),
    "aten.pow base": lambda x, y, s: aten.pow.Scalar(THIRD, x),
    "aten.pow tensors": lambda x, y, s: aten.pow.Tensor_Tensor(x.abs(), y),
    "aten.lerp": lambda x, y, s: aten.lerp.Scalar(x, y, THIRD),
    "aten.lerp far": lambda x, y, s: aten.lerp.Scalar(x, y, 1 - THIRD),
    "aten.eq": lambda x, y, s: aten.eq.Scalar(x.round(), 1.0),
    "aten.ne": lambda x, y, s: aten.ne.Scalar(x.round(), 1.0),
    "aten.lt": lambda x, y, s: aten.lt.Scalar(x, THIRD),
    "aten.le": lambda x, y, s: aten.le.Scalar(x, THIRD),
    "aten.gt": lambda x, y, s: aten.gt.Scalar(x, THIRD),
    "aten.ge": lambda x, y, s: aten.ge.Scalar(x, THIRD),
    "aten.full": lambda x, y, s: aten.full([2, 3], THIRD, dtype=x.dtype) + s,
    "aten.full_like": lambda x, y, s: aten.full_like(x, THIRD),
    "aten.scalar_tensor": lambda x, y, s: aten.scalar_tensor(THIRD, dtype=x.dtype) + s,
    "aten.linalg_vector_norm": lambda x, y, s: aten.linalg_vector_norm(x),
    "aten.linalg_vector_norm wide": lambda x, y, s: aten.linalg_vector_norm(x, dtype=torch.float64),
}


@every_dtype
def test_arithmetic_with_numbers_is_exact(dtype: torch.dtype) -> None:
    x, y = randn(7, 5).to(dtype), randn(7, 5, seed=1).to(dtype)
    given = (x, y, torch.tensor(0.7, dtype=dtype))
    check(**{name: (function, given) for name, function in ARITHMETIC.items()})


def test_mv_and_addmv_are_right() -> None:
    a, v, b = randn(4, 6), randn(6, seed=1), randn(4, seed=2)
    check(
        mv=(lambda a, v: aten.mv(a, v), (a, v)),
        addmv=(lambda b, a, v: aten.addmv(b, a, v, beta=0.5, alpha=2), (b, a, v)),
    )


DIVIDENDS = [2**62 + 3, 2**24 + 1, -(2**53) - 1, 7, -7, 6, -6, 0, 1, -1]


@pytest.mark.parametrize("mode", ["floor", "trunc"])
def test_division_of_integers_is_exact(mode: str) -> None:
    """The exporter's goes through float32: right to 24 bits."""
    x = torch.tensor(DIVIDENDS)
    cases: dict[str, Case] = {}
    for divisor in (2, 3, -3, 2**40, -1):
        cases[f"by {divisor}"] = (
            lambda x, y=divisor: aten.div(x, y, rounding_mode=mode),
            [x],
        )
        cases[f"by the tensor {divisor}"] = (
            lambda x, y: aten.div(x, y, rounding_mode=mode),
            [x, torch.full_like(x, divisor)],
        )
        cases[f"rest of {divisor}"] = lambda x, y=divisor: aten.remainder(x, y), [x]
    found = run_onnx(list(cases.values()))
    for (name, (function, inputs)), (result,) in zip(cases.items(), found, strict=True):
        assert torch.equal(result, function(*inputs)), name


@every_dtype
def test_division_of_floats_rounds_as_aten_does(dtype: torch.dtype) -> None:
    """0.6 / 0.2 is a little less than 3, and 1 / 0 has no rest."""
    x = torch.tensor([0.6, -0.6, 1.0, 7.5, -7.5, 0.0, 1e-3, 3.0]).to(dtype)
    y = torch.tensor([0.2, 0.2, 0.1, -2.0, -2.0, 3.0, 1e3, 1.0]).to(dtype)
    for mode in ("floor", "trunc"):
        ((found,),) = run_onnx([(lambda x, y, m=mode: aten.div(x, y, rounding_mode=m), [x, y])])
        assert torch.equal(found, aten.div(x, y, rounding_mode=mode)), mode


@every_dtype
def test_sort_is_stable(dtype: torch.dtype) -> None:
    x = torch.tensor([[3, 1, 2, 1, 3], [0, 0, -1, 5, 0], [2, 2, 2, 2, 2]]).to(dtype)
    cases: dict[str, Case] = {}
    for dim in (0, 1, -1):
        for descending in (False, True):
            cases[f"dim {dim}, descending {descending}"] = (
                lambda x, d=dim, down=descending: aten.sort(x, stable=True, dim=d, descending=down),
                [x],
            )
    cases["int64"] = lambda x: aten.sort(x, stable=True), [x.long() * 2**40]
    check(**cases)


def test_the_error_function_is_exact_in_every_region() -> None:
    x = torch.cat([torch.linspace(-7, 7, 4001), torch.tensor([0.0, 0.46875, 4.0, 6.0, 1e-300])])
    x = torch.cat([x.double(), torch.tensor([float("inf"), -float("inf"), float("nan")])])
    ((found,),) = run_onnx([(aten.erf, [x])])
    torch.testing.assert_close(found, torch.erf(x), rtol=4e-16, atol=0, equal_nan=True)


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


def test_every_form_has_a_test_here() -> None:
    source = Path(__file__).read_text()
    untested = [
        target._schema.name
        for target in FORMS
        if f"aten.{target._schema.name.removeprefix('aten::')}" not in source
    ]
    assert not untested
