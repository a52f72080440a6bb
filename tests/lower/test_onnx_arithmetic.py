"""ONNX forms of arithmetic, rounding and sorting: exact, or to the last bit but one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.lower.onnx_cases import Case, check, every_dtype, randn, run_onnx

aten = torch.ops.aten

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
