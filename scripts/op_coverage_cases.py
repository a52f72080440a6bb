"""Operators of PyTorch's own op database as models, each put through a whole SAM step.

Of every differentiable operator up to eight sample inputs are taken that differ in their keyword
arguments and ranks. Its differentiable inputs become the parameters of a model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that hypothesis is not installed
    from torch.testing._internal.common_methods_invocations import op_db

_FAMILIES = ("linalg.", "fft.", "special.")
_THEIR_KIN = {
    *("cholesky", "cholesky_inverse", "cholesky_solve", "geqrf", "logdet", "lu", "lu_solve"),
    *("lu_unpack", "matrix_exp", "norm.nuc", "ormqr", "pca_lowrank", "pinverse", "qr", "svd"),
    *("svd_lowrank", "triangular_solve", "stft", "istft", "erfinv", "i0"),
}


_RANDOM = {
    *("bernoulli", "normal", "normal.number_mean", "nn.functional.rrelu"),
    *(f"nn.functional.{name}" for name in ("dropout", "dropout2d", "dropout3d", "alpha_dropout")),
    *("nn.functional.feature_alpha_dropout.with_train", "nn.functional.fractional_max_pool2d"),
    *("nn.functional.fractional_max_pool3d", "nn.functional.multi_head_attention_forward"),
    "nn.functional.scaled_dot_product_attention",
}
"""The database's calls of these seed torch's generator, which a step refuses."""


def counts_apart(name: str) -> str:
    """``linalg, fft, special`` for factorizations and solvers, Fourier transforms and special
    functions, few of which have an ONNX form; ``random`` for draws; empty for all else."""
    if name in _RANDOM:
        return "random"
    return "linalg, fft, special" if name.startswith(_FAMILIES) or name in _THEIR_KIN else ""


@dataclass(frozen=True)
class Sample:
    """One call of an operator.

    Attributes:
        parameters: The differentiable inputs.
        call: A function of replacements for them.
    """

    parameters: list[Tensor]
    call: Callable[[list[Tensor]], Any]


def operators() -> dict[str, Any]:
    """Name, with its variant, to `OpInfo`, of all that are differentiable in float32."""
    found = {}
    for info in op_db:
        if info.supports_autograd and torch.float32 in info.supported_backward_dtypes("cpu"):
            name = f"{info.name}.{info.variant_test_name}" if info.variant_test_name else info.name
            found[name] = info
    return found


def samples(info: Any, count: int) -> list[Sample]:
    """Up to ``count`` sample inputs, those first that differ in keyword arguments and ranks."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = list(info.sample_inputs("cpu", torch.float32, requires_grad=True))
    kinds: dict[str, list[Sample]] = {}
    for item in given:
        sample = _sample(info, item)
        if sample is not None:
            kinds.setdefault(_kind(item), []).append(sample)
    # One of each kind, then a second of each.
    rounds = max(map(len, kinds.values()), default=0)
    ordered = [own[index] for index in range(rounds) for own in kinds.values() if index < len(own)]
    return ordered[:count]


def _kind(item: Any) -> str:
    ranks = [
        value.dim() if isinstance(value, Tensor) else type(value).__name__
        for value in pytree.tree_leaves((item.input, item.args))
    ]
    return f"{ranks} {sorted((k, str(type(v))) for k, v in item.kwargs.items())}"


def _sample(info: Any, item: Any) -> Sample | None:
    leaves, spec = pytree.tree_flatten((item.input, item.args, item.kwargs))
    places = [i for i, v in enumerate(leaves) if isinstance(v, Tensor) and v.requires_grad]
    fixed = [v.detach().clone() if isinstance(v, Tensor) else v for v in leaves]

    def call(parameters: list[Tensor]) -> Any:
        dtype = parameters[0].dtype  # float64 where the judge runs
        values = [
            v.to(dtype) if isinstance(v, Tensor) and v.dtype == torch.float32 else v for v in fixed
        ]
        for place, parameter in zip(places, parameters, strict=True):
            values[place] = parameter
        first, args, kwargs = pytree.tree_unflatten(values, spec)
        output = info.op(first, *args, **kwargs)
        return item.output_process_fn_grad(output)

    parameters = [leaves[i].detach().clone() for i in places]
    if not parameters or any(not p.numel() or p.is_complex() for p in parameters):
        return None  # nothing to train, or not what a model's parameters are
    try:
        outputs = list(_floats(call([p.clone() for p in parameters])))
    except Exception:  # some samples need inputs that require gradients
        outputs = list(_floats(call([p.clone().requires_grad_() for p in parameters])))
    return Sample(parameters, call) if outputs else None


def _floats(output: Any) -> Iterator[Tensor]:
    for value in pytree.tree_leaves(output):
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            yield value


class OperatorModel(nn.Module):
    """Sum of a nonlinear function of every output, so that gradients depend on the values."""

    def __init__(self, own: list[Sample]) -> None:
        super().__init__()
        self.own = own
        self.values = nn.ParameterList(p.clone() for sample in own for p in sample.parameters)

    def forward(self, x: Tensor) -> Tensor:
        values = iter(self.values)
        total = x.new_zeros(())
        for sample in self.own:
            outputs = sample.call([next(values) for _ in sample.parameters])
            for output in _floats(outputs):
                flat = output.reshape(-1).to(x.dtype)
                weights = torch.linspace(0.5, 1.5, flat.shape[0], dtype=x.dtype)
                total = total + (weights * flat * (1 + 0.1 * torch.tanh(flat))).mean()
        return total * x.mean()
