"""Runs ATen operators as ONNX in ONNX Runtime, and compares with the operators themselves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from sam_export._compat import tracing
from sam_export.artifact.contract import ProgramSpec, StepContract, TensorSpec
from sam_export.lower.onnx_artifact import checked
from sam_export.lower.onnx_graph import onnx_model
from sam_export.lower.onnx_ops import PORTABLE
from sam_export.lower.onnx_ops.table import Tables
from sam_export.runtime.ort_session import FLOAT32_FUSIONS

# A float32 sum of n products is off by about sqrt(n) * eps; the largest here has n = 2,000.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Case = tuple[Callable[..., Any], Sequence[Tensor]]


def as_list(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def model_of(cases: Sequence[Case], tables: Tables = PORTABLE) -> ir.Model:
    """All cases as one graph: an export costs a second, an operator nothing."""
    inputs = [tensor for _, tensors in cases for tensor in tensors]

    def all_of_them(*tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        return [
            result
            for function, own in cases
            for result in as_list(function(*(next(given) for _ in own)))
        ]

    names = tuple(f"in{i}" for i in range(len(inputs)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # pytree's, about its own LeafSpec
        # As `capture` does it: make_fx can trace autograd, export cannot.
        raw = make_fx(all_of_them, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        program = torch.export.export(tracing.Interpreted(raw), tuple(inputs), strict=False)
        program = program.run_decompositions({})

    def spec(name: str, tensor: Tensor) -> TensorSpec:
        return TensorSpec(name, "input", str(tensor.dtype).split(".")[1], tuple(tensor.shape))

    batch = tuple(spec(name, tensor) for name, tensor in zip(names, inputs, strict=True))
    flat = all_of_them(*inputs)
    outputs = tuple(spec(f"out{i}", tensor) for i, tensor in enumerate(flat))
    step = ProgramSpec("step", names, outputs, {})
    contract = StepContract((), (), batch, "tuple", {}, (step,), "tensor", (), "none")
    return onnx_model(program, step, contract, tables)


def run_onnx(cases: Sequence[Case], tables: Tables = PORTABLE) -> list[list[Tensor]]:
    """What ONNX Runtime returns for each case."""
    data = checked("step.onnx", ir.to_proto(model_of(cases, tables)))
    session = ort.InferenceSession(data, disabled_optimizers=list(FLOAT32_FUSIONS))
    inputs = [tensor for _, tensors in cases for tensor in tensors]
    found = iter(session.run(None, {f"in{i}": value.numpy() for i, value in enumerate(inputs)}))
    counts = [len(as_list(function(*tensors))) for function, tensors in cases]
    return [[torch.from_numpy(next(found)) for _ in range(count)] for count in counts]


def with_gradients(function: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """Outputs of a function, and the gradients of its floating-point inputs.

    The gradients are of a weighted sum of the outputs, which tells their elements apart.
    """

    def both(*inputs: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
            outputs = as_list(function(*leaves))
            total = sum(
                (output * torch.linspace(0.5, 1.5, output.numel()).to(output).view_as(output)).sum()
                for output in outputs
                if output.requires_grad
            )
            given = [leaf for leaf in leaves if leaf.requires_grad]
            if not isinstance(total, Tensor):
                return [output.detach() for output in outputs]
            gradients = torch.autograd.grad(total, given, allow_unused=True)
        return [*(o.detach() for o in outputs), *(g for g in gradients if g is not None)]

    return both


def check(
    tolerances: Mapping[str, float] | None = None, tables: Tables = PORTABLE, /, **cases: Case
) -> None:
    """Every case against the function itself; the message names those that differ.

    Args:
        tolerances: Of cases that have one of their own.
        tables: What operators are written with.
        cases: By name.
    """
    wrong = {}
    found = run_onnx(list(cases.values()), tables)
    for (name, (function, inputs)), results in zip(cases.items(), found, strict=True):
        for index, wanted in enumerate(as_list(function(*inputs))):
            result = results[index]
            assert result.shape == wanted.shape, name
            assert result.dtype == wanted.dtype, name
            undefined = wanted.isnan()  # in the same places
            if not torch.equal(result.isnan(), undefined) or not torch.equal(
                result[wanted.isinf()], wanted[wanted.isinf()]
            ):
                wrong[f"{name}, output {index}"] = math.nan
                continue
            finite = wanted.isfinite()
            left, right = result[finite].double(), wanted[finite].double()
            scale = float(right.abs().max()) if right.numel() else 1.0
            error = float((left - right).abs().max()) / (scale or 1.0) if right.numel() else 0.0
            dtype = wanted.dtype if wanted.is_floating_point() else torch.float64
            own = (tolerances or {}).get(name, TOLERANCE[dtype])
            if not error <= own and not torch.equal(result, wanted):
                wrong[f"{name}, output {index}"] = error
    assert not wrong, wrong


every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
