"""ONNX forms of activations, forward and backward, in float64 to the last digits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.lower.onnx_cases import check, every_dtype, randn

aten = torch.ops.aten

FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": lambda x: F.hardtanh(x, -1 / 3, 1 / 7),
    "relu6": F.relu6,
    "clamp": lambda x: aten.clamp(x, -1 / 3, 1 / 7),
    "clamp_min": lambda x: aten.clamp_min(x, 1 / 3),
    "clamp_max": lambda x: aten.clamp_max(x, 1 / 3),
    "clamp integers": lambda x: aten.clamp(x.long(), -2, 3),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
    "elu": lambda x: F.elu(x, 0.7),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.7),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": lambda x: F.softplus(x, 0.9),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "logsigmoid": F.logsigmoid,
    "softshrink": lambda x: F.softshrink(x, 1 / 3),
    "hardshrink": lambda x: F.hardshrink(x, 1 / 3),
    "threshold": lambda x: F.threshold(x, 1 / 3, 1 / 7),
}

BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hardsigmoid": aten.hardsigmoid_backward,
    "hardswish": aten.hardswish_backward,
    "hardtanh": lambda dy, x: aten.hardtanh_backward(dy, x, -1 / 3, 1 / 7),
    "leaky_relu": lambda dy, x: aten.leaky_relu_backward(dy, x, 0.01, False),
    "elu": lambda dy, x: aten.elu_backward(dy, 0.7, 1.0, 1.0, False, x),
    "elu scaled": lambda dy, x: aten.elu_backward(dy, 1.6732, 1.0507, 1 / 0.7, False, x),
    "softplus": lambda dy, x: aten.softplus_backward(dy, x, 0.9, 20.0),
    "gelu": lambda dy, x: aten.gelu_backward(dy, x),
    "gelu tanh": lambda dy, x: aten.gelu_backward(dy, x, approximate="tanh"),
}


@every_dtype
def test_activations(dtype: torch.dtype) -> None:
    # With the places where the piecewise ones break.
    x = torch.cat([4 * randn(60), torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0, 6.0])]).to(dtype)
    dy = randn(66, seed=1).to(dtype)
    cases = {name: (function, (x,)) for name, function in FORWARD.items()}
    cases |= {f"{name} backward": (function, (dy, x)) for name, function in BACKWARD.items()}
    check(**cases)
