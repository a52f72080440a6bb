"""Training operators of ONNX Runtime against ATen, and that they are used where they should be.

The cases are those of the portable forms. In float64, and for arguments that the training operators
do not take, the portable forms are used: then no training operator may be in the graph.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from sam_export.lower.onnx_artifact import checked
from sam_export.lower.onnx_training_nodes import SIGNATURES, TRAINING_DOMAIN
from sam_export.lower.onnx_training_ops import TRAINING, TRAINING_FORMS
from tests.lower.onnx_cases import Case, check, every_dtype, model_of, randn
from tests.lower.op_table import TABLE
from tests.lower.test_onnx_convolution import CONVOLUTIONS, convolution_backward_case
from tests.lower.test_onnx_ops import (
    POOLS,
    batch_norm_inputs,
    in_training,
    pool_case,
    training_gradient,
    without_statistics,
)
from tests.lower.test_op_table import case, rows

aten = torch.ops.aten
pytestmark = pytest.mark.needs("onnx-training")


def gradient_cases(dtype: torch.dtype) -> dict[str, Case]:
    """Each form at least once with arguments that it writes with a training operator."""
    x, dy = randn(4, 6, 5).to(dtype), randn(4, 6, 5, seed=1).to(dtype)
    w, b = randn(6, 5, seed=2).to(dtype), randn(6, 5, seed=3).to(dtype)
    own, mask = [6, 5], [True, True, True]

    def layer_norm(x: Tensor, dy: Tensor, w: Tensor, b: Tensor) -> Any:
        _, mean, rstd = aten.native_layer_norm(x, own, w, b, 1e-3)
        return aten.native_layer_norm_backward(dy, x, own, mean, rstd, w, b, mask)

    def softmax(x: Tensor, dy: Tensor, dim: int) -> Any:
        return aten._softmax_backward_data(dy, x.softmax(dim), dim, x.dtype)

    return {
        "sigmoid": (lambda x, dy: aten.sigmoid_backward(dy, x.sigmoid()), [x, dy]),
        "tanh": (lambda x, dy: aten.tanh_backward(dy, x.tanh()), [x, dy]),
        "softmax": (lambda x, dy: softmax(x, dy, -1), [x, dy]),
        "softmax, inner axis": (lambda x, dy: softmax(x, dy, 1), [x, dy]),
        "layer norm": (layer_norm, [x, dy, w, b]),
        **batch_norm_cases((3, 4, 5, 6), dtype),
        "convolution, groups": convolution_backward_case("groups, many pixels", dtype),
        "max pool": pool_case("overlapping", dtype),
    }


def batch_norm_cases(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Case]:
    given = batch_norm_inputs(shape, dtype)
    functions = {
        "training": (in_training, "xwb"),
        "gradient": (training_gradient, ["dy", "x", "w"]),
        "no statistics": (without_statistics, "xwb"),
    }
    return {
        f"batch norm {shape}, {name}": (
            function,
            [given[key] for key in (*names, *(() if name == "no statistics" else ("mean", "var")))],
        )
        for name, (function, names) in functions.items()
    }


def used(cases: dict[str, Case]) -> Counter[str]:
    model = model_of(list(cases.values()), TRAINING)
    return Counter(node.op_type for node in model.graph if node.domain == TRAINING_DOMAIN)


WRITES_AND_UPDATES = {"InPlaceAccumulatorV2", "SGDOptimizerV2", "AdamWOptimizer"}
"""Operators of the target ``ort-artifacts`` alone, which its own tests run."""


def test_every_training_operator_is_used_and_right() -> None:
    cases = gradient_cases(torch.float32)
    assert set(used(cases)) == set(SIGNATURES) - WRITES_AND_UPDATES
    check(None, TRAINING, **cases)


def test_no_training_operator_in_float64() -> None:
    """They have no float64 kernels, or float32 statistics inside."""
    cases = gradient_cases(torch.float64)
    assert not used(cases)
    check(None, TRAINING, **cases)


def test_every_form_is_tested() -> None:
    """By name in this file, or through the case of another one that this file runs."""
    names = {target._schema.name.split("::")[1] for target in TRAINING_FORMS}
    assert names == {
        "sigmoid_backward",
        "tanh_backward",
        "_softmax_backward_data",
        "native_layer_norm_backward",
        "_native_batch_norm_legit_functional",
        "_native_batch_norm_legit",
        "native_batch_norm_backward",
        "convolution_backward",
        "max_pool2d_with_indices_backward",
    }


def test_convolutions() -> None:
    """All sizes and options of the portable tests; ``ConvGrad`` in the larger ones."""
    cases = {name: convolution_backward_case(name, torch.float32) for name in CONVOLUTIONS}
    check(None, TRAINING, **cases)
    with_operator = {name for name, own in cases.items() if used({name: own})["ConvGrad"]}
    assert with_operator == {
        "many pixels",
        "many pixels, stride",
        "few channels of many pixels",
        "1x1, more pixels",
        "1x1",
        "groups",
        "groups, tiny",
        "groups, many pixels",
        "depthwise",
        "depthwise, multiplier and stride",
        "depthwise 1d",
    }


def test_the_input_gradient_is_not_computed_twice() -> None:
    model = model_of([convolution_backward_case("many pixels", torch.float32)], TRAINING)
    (node,) = (node for node in model.graph if node.op_type == "ConvGrad")
    assert [bool(output.name) for output in node.outputs] == [False, True]


def test_batch_norms() -> None:
    """Two axes stay portable: a channel is a strided column there."""
    shapes = ((6, 5, 7), (3, 4, 12, 11), (2, 3, 4, 3, 5))
    check(
        None,
        TRAINING,
        **{k: v for s in shapes for k, v in batch_norm_cases(s, torch.float32).items()},
    )
    cases = batch_norm_cases((6, 5), torch.float32)
    assert not used(cases)
    check(None, TRAINING, **cases)


def test_pools() -> None:
    check(None, TRAINING, **{name: pool_case(name, torch.float32) for name in POOLS})


@every_dtype
def test_a_layer_norm_without_weight(dtype: torch.dtype) -> None:
    """``LayerNormalizationGrad`` wants one."""

    def backward(x: Tensor, dy: Tensor) -> Any:
        _, mean, rstd = aten.native_layer_norm(x, [5], None, None, 1e-3)
        mask = [True, False, False]
        return aten.native_layer_norm_backward(dy, x, [5], mean, rstd, None, None, mask)[0]

    cases = {"plain": (backward, [randn(6, 5).to(dtype), randn(6, 5, seed=1).to(dtype)])}
    assert not used(cases)
    check(None, TRAINING, **cases)


def test_a_batch_that_is_not_finite_leaves_no_trace() -> None:
    """``BatchNormInternal`` may write into what it is given, constants of the graph too."""
    given = batch_norm_inputs((3, 4, 5, 6), torch.float32)
    inputs = [given[name] for name in ("x", "w", "b", "mean", "var")]
    model = model_of([(in_training, inputs)], TRAINING)
    session = ort.InferenceSession(checked("step.onnx", ir.to_proto(model)))
    fed = {f"in{i}": value.numpy() for i, value in enumerate(inputs)}
    before = [np.copy(value) for value in session.run(None, fed)]
    spoilt = {**fed, "in0": np.full_like(fed["in0"], np.nan)}
    assert np.isnan(session.run(None, spoilt)[0]).all()
    for value, wanted in zip(session.run(None, fed), before, strict=True):
        np.testing.assert_array_equal(value, wanted)
    for name, value in zip(fed, inputs, strict=True):
        np.testing.assert_array_equal(fed[name], value.numpy())


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore:index_reduce", "ignore:The reduce argument of torch.scatter")
@every_dtype
@pytest.mark.parametrize("group", TABLE)
def test_rows(group: str, dtype: torch.dtype) -> None:
    """The whole table of operators, as `test_op_table.test_rows` has it for the portable forms."""
    own = rows(group, dtype, gaps=False)
    tolerances = {row.op: row.tolerance[dtype] for row in own}
    check(tolerances, TRAINING, **{row.op: case(row, dtype) for row in own})
