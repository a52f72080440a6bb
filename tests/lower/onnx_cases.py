"""Runs ATen operators as ONNX in ONNX Runtime, and compares with the operators themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from sam_export.artifact.contract import ProgramSpec, StepContract, TensorSpec
from sam_export.lower.onnx_graph import onnx_model

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
        ir.to_proto(model).SerializeToString(),
        disabled_optimizers=["MatmulTransposeFusion", "MatMulScaleFusion"],  # as `runtime.ort` does
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


every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
