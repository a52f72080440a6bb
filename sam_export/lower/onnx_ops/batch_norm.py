"""Batch normalization in training, in evaluation, and its gradient.

ONNX's ``BatchNormalization`` in training mode is not used: its running variance is the biased one,
and ONNX Runtime overwrites its inputs there. In inference mode it is one pass over memory that
computes ``scale * (x - mean) / sqrt(var + epsilon) + bias`` per channel; fed with the statistics
of the batch it is exactly the forward pass, and fed with mean 0 and variance 1 any affine map.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

from sam_export.lower.onnx_ops.half import in_float32
from sam_export.lower.onnx_ops.table import full, ints, lowering, scalar, sizes

_SPREAD = "sam_export.batch_norm.spread"
"""Key of a mean's metadata: the same mean of shape ``[1, C, 1, ...]``."""

_LARGE_IMAGE = 128
"""From this many pixels on ``_dot`` is a matrix product for each image and channel.

Measured at one thread in onnxruntime-training 1.19.2, 32 images of 64 channels, 32x32: 0.65 against
2.0 ms for a product and its sum (two passes over memory less); of 256 channels, 8x8: 0.56 against
0.31.
"""


@lowering("aten::_native_batch_norm_legit_functional")
@in_float32(keeps=(3, 4))
def batch_norm_training(
    x: ir.Value,
    w: ir.Value | None,
    b: ir.Value | None,
    running_mean: ir.Value,
    running_var: ir.Value,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Any, Any, Any, Any, Any]:
    """aten::_native_batch_norm_legit_functional(Tensor input, Tensor? weight, Tensor? bias, Tensor
    running_mean, Tensor running_var, bool training, float momentum, float eps) -> (Tensor, Tensor,
    Tensor, Tensor running_mean_out, Tensor running_var_out)

    Over all axes but 1, with ``n`` elements per channel::

        mean = sum(x) / n;  var = sum((x - mean)^2) / n        # biased, as for the output
        y    = w * (x - mean) / sqrt(var + eps) + b
        running_mean' = (1 - momentum) * running_mean + momentum * mean
        running_var'  = (1 - momentum) * running_var  + momentum * var * n / (n - 1)
    """
    if not training:
        y = _normalized(x, w, b, running_mean, op.Add(running_var, scalar(eps, x)))
        # An input as it is may not be a result: the exporter gives results names.
        kept = (op.Identity(running_mean), op.Identity(running_var))
        return y, full(0, 0.0, x), full(0, 0.0, x), *kept
    y, mean, var, invstd = _batch_statistics(x, w, b, eps)
    running = running_statistics(x, mean, var, running_mean, running_var, momentum)
    return y, mean, invstd, *running


def running_statistics(
    x: ir.Value, mean: Any, var: Any, running_mean: ir.Value, running_var: ir.Value, momentum: float
) -> tuple[Any, Any]:
    """The new running mean and variance after a batch of the (biased) ``mean`` and ``var``."""
    n = _per_channel(x)
    unbiased = op.Mul(var, op.Div(n, op.Sub(n, scalar(1.0, x))))
    keep, take = scalar(1.0 - momentum, x), scalar(momentum, x)
    new_mean = op.Add(op.Mul(running_mean, keep), op.Mul(mean, take))
    return new_mean, op.Add(op.Mul(running_var, keep), op.Mul(unbiased, take))


@lowering("aten::_native_batch_norm_legit.no_stats")
@in_float32()
def batch_norm_without_statistics(
    x: ir.Value, w: ir.Value | None, b: ir.Value | None, training: bool, momentum: float, eps: float
) -> tuple[Any, Any, Any]:
    """aten::_native_batch_norm_legit.no_stats(Tensor input, Tensor? weight, Tensor? bias, bool
    training, float momentum, float eps) -> (Tensor, Tensor, Tensor)

    As in training, with no running statistics to update.
    """
    del training, momentum
    y, mean, _, invstd = _batch_statistics(x, w, b, eps)
    return y, mean, invstd


@lowering("aten::_native_batch_norm_legit_no_training")
@in_float32()
def batch_norm_evaluation(
    x: ir.Value,
    w: ir.Value | None,
    b: ir.Value | None,
    running_mean: ir.Value,
    running_var: ir.Value,
    momentum: float,
    eps: float,
) -> tuple[Any, Any, Any]:
    """aten::_native_batch_norm_legit_no_training(Tensor input, Tensor? weight, Tensor? bias, Tensor
    running_mean, Tensor running_var, float momentum, float eps) -> (Tensor, Tensor, Tensor)

    ``w * (x - running_mean) / sqrt(running_var + eps) + b``.
    """
    del momentum
    y = _normalized(x, w, b, running_mean, op.Add(running_var, scalar(eps, x)))
    return y, full(0, 0.0, x), full(0, 0.0, x)


@lowering("aten::native_batch_norm")
@in_float32()
def batch_norm(
    x: ir.Value,
    w: ir.Value | None,
    b: ir.Value | None,
    running_mean: ir.Value,
    running_var: ir.Value,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Any, Any, Any]:
    """aten::native_batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean,
    Tensor? running_var, bool training, float momentum, float eps) -> (Tensor, Tensor, Tensor)

    Only in evaluation: capture refuses the training form, which changes its inputs.
    """
    assert not training
    return batch_norm_evaluation(x, w, b, running_mean, running_var, momentum, eps)  # type: ignore[no-any-return]


@lowering("aten::native_batch_norm_backward")
@in_float32()
def batch_norm_backward(
    dy: ir.Value,
    x: ir.Value,
    w: ir.Value | None,
    running_mean: ir.Value | None,
    running_var: ir.Value | None,
    mean: ir.Value | None,
    invstd: ir.Value | None,
    train: bool,
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[Any, Any, Any]:
    """aten::native_batch_norm_backward(Tensor grad_out, Tensor input, Tensor? weight, Tensor?
    running_mean, Tensor? running_var, Tensor? save_mean, Tensor? save_invstd, bool train, float
    eps, bool[3] output_mask) -> (Tensor, Tensor, Tensor)

    With ``xc = x - mean`` and sums over all axes but 1::

        db = sum(dy);  dot = sum(dy * xc);  dw = dot * invstd
        dx = w * invstd * (dy - db / n - xc * dot * invstd^2 / n)      # training
        dx = w * invstd * dy                                           # fixed statistics

    In training ``dx`` is an affine map of ``dy`` per channel plus a multiple of ``xc``.
    """
    axes = ints(0, *range(2, len(sizes(x))))
    if not train:
        assert running_var is not None
        mean = running_mean
        invstd = op.Reciprocal(op.Sqrt(op.Add(running_var, scalar(eps, x))))
    assert invstd is not None
    assert mean is not None
    # As the forward pass has it, so that the difference is one node with the one computed there.
    centered = op.Sub(x, mean.meta.get(_SPREAD) or _spread(mean, x))
    db = op.ReduceSum(dy, axes, keepdims=0)
    dot = _dot(dy, centered, sizes(x))
    scale = invstd if w is None else op.Mul(invstd, w)
    dx = scalar(0.0, x)
    if output_mask[0] and not train:
        dx = op.Mul(dy, _spread(scale, x))
    elif output_mask[0]:
        n = _per_channel(x)
        shift = op.Neg(op.Div(op.Mul(scale, db), n))
        slope = op.Neg(op.Div(op.Mul(op.Mul(scale, dot), op.Mul(invstd, invstd)), n))
        zero, one = _constant(0.0, x), _constant(1.0, x)
        affine = op.BatchNormalization(dy, scale, shift, zero, one, epsilon=0.0)
        dx = op.Add(affine, op.Mul(centered, _spread(slope, x)))
    return dx, op.Mul(dot, invstd), db


def _batch_statistics(
    x: ir.Value, w: ir.Value | None, b: ir.Value | None, eps: float
) -> tuple[Any, Any, Any, Any]:
    axes = ints(0, *range(2, len(sizes(x))))
    mean = op.ReduceMean(x, axes, keepdims=1)
    centered = op.Sub(x, mean)
    var = op.Div(_dot(centered, centered, sizes(x)), _per_channel(x))
    vector = op.Squeeze(mean, axes)
    vector.meta[_SPREAD] = mean
    variance = op.Add(var, scalar(eps, x))
    y = _normalized(x, w, b, vector, variance)
    return y, vector, var, op.Reciprocal(op.Sqrt(variance))


def _normalized(x: ir.Value, w: Any, b: Any, mean: Any, variance: Any) -> Any:
    """One pass; ``variance`` holds eps already, since the attribute is only float32."""
    w = _constant(1.0, x) if w is None else w
    b = _constant(0.0, x) if b is None else b
    return op.BatchNormalization(x, w, b, mean, variance, epsilon=0.0)


def _dot(a: Any, b: Any, shape: list[int | None]) -> Any:
    """``sum(a * b)`` over all axes but 1, of two tensors of the shape ``[N, C, ...]``."""
    axes = ints(0, *range(2, len(shape)))
    image = [size for size in shape[2:] if size is not None]
    if len(image) < len(shape) - 2 or prod(image) < _LARGE_IMAGE:
        return op.ReduceSum(op.Mul(a, b), axes, keepdims=0)
    row = op.Reshape(a, ints(0, 0, 1, -1))
    column = op.Transpose(op.Reshape(b, ints(0, 0, 1, -1)), perm=[0, 1, 3, 2])
    return op.ReduceSum(op.MatMul(row, column), ints(0, 2, 3), keepdims=0)


def _constant(value: float, x: ir.Value) -> Any:
    """A vector of one number per channel. An instance norm has ``N * C`` of them, symbolic."""
    channels = sizes(x)[1]
    if channels is not None:
        return full(channels, value, x)
    return op.Expand(scalar(value, x), op.Shape(x, start=1, end=2))


def _spread(vector: Any, x: ir.Value) -> Any:
    """A vector of the channels as ``[1, C, 1, ...]``."""
    return op.Unsqueeze(vector, ints(0, *range(2, len(sizes(x)))))


def _per_channel(x: ir.Value) -> Any:
    """Elements per channel, as a scalar of the dtype of ``x``; the batch may be symbolic."""
    channels = sizes(x)[1]
    if channels is not None:
        count = op.Div(op.Size(x), op.Constant(value_int=channels))
    else:
        count = op.Div(op.Size(x), op.Squeeze(op.Shape(x, start=1, end=2), ints(0)))
    return op.CastLike(count, x)
