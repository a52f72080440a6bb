"""Steps exported for a CUDA device: the same numbers, and nothing that leaves the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export.lower.onnx_cuda import ON_HOST
from sam_export.lower.onnx_cuda_kernels import MEANT_FOR, NO_CUDA_KERNEL, cuda_tables
from sam_export.lower.onnx_ops import PORTABLE
from sam_export.lower.onnx_training_nodes import SIGNATURES
from tests.lower.onnx_cases import Case, check, model_of, randn
from tests.runtime.target_cases import images, make

TARGETS = ["onnx", "onnx-training", "ort-artifacts"]
ELEMENTARY = ("acos", "acosh", "asin", "asinh", "atan", "atanh", "cosh", "sinh", "tan")


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_numbers_are_those_of_a_step_for_the_cpu(
    target: str, base: str, tmp_path: Path
) -> None:
    """Bit for bit, also over a step that is not finite; a build for CUDA runs on the CPU too."""
    captured = sx.capture(make(torch.float32, base), images(8, torch.float32))
    paths = {
        device: sx.export(captured, tmp_path / device, target=target, device=device)
        for device in ("cpu", "cuda")
    }
    assert {device: made.details["device"] for device, made in paths.items()} == {
        "cpu": "cpu",
        "cuda": "cuda",
    }
    here, other = (sx.load(made.path) for made in paths.values())
    for index, size in enumerate((8, 5, 8, 3)):
        x, y = images(size, torch.float32, seed=index)
        if index == 2:
            x = x.clone()
            x[0] = float("nan")
        found, wanted = other.step(x, y), here.step(x, y)
        assert bool(found.finite) == bool(wanted.finite) == (index != 2)
        for name in ("loss", "perturbed_loss", "grad_norm", "perturbation_norm"):
            np.testing.assert_array_equal(
                np.asarray(getattr(found, name)), np.asarray(getattr(wanted, name))
            )
        for name, value in here.state.items():
            np.testing.assert_array_equal(other.state[name], value, err_msg=name)
    np.testing.assert_array_equal(other.evaluate(x), here.evaluate(x))


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_waits_for_the_host(target: str, tmp_path: Path) -> None:
    """No branch; and what is computed from sizes is read only where kernels want it on the host."""
    captured = sx.capture(make(torch.float32, "sgd"), images(8, torch.float32))
    path = sx.export(captured, tmp_path / "step", target=target, device="cuda").path
    name = "training_model.onnx" if target == "ort-artifacts" else "step.onnx"
    model = onnx.load(str(path / name))
    nodes = list(model.graph.node)
    assert "If" not in {node.op_type for node in nodes}
    assert "Range" in {node.op_type for node in nodes}
    constants = {value.name for value in model.graph.initializer}
    constants |= {node.output[0] for node in nodes if node.op_type == "Constant"}
    host: set[str] = set()
    for node in nodes:
        wanted = ON_HOST.get(node.op_type, ())
        read = {value for index, value in enumerate(node.input) if index not in wanted and value}
        if node.op_type in ("Shape", "Size") or (
            read & host and read <= host | constants and not set(node.input) - host - constants
        ):
            host.update(node.output)
        else:
            assert not read & host, f"{node.name} reads {read & host} on the device"


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_the_stock_optimizer_reads_all_it_is_given(base: str, tmp_path: Path) -> None:
    """An input that no node reads would be copied to the host at each step."""
    captured = sx.capture(make(torch.float32, base), images(8, torch.float32))
    path = sx.export(captured, tmp_path / "step", target="ort-artifacts", device="cuda").path
    graph = onnx.load(str(path / "optimizer_model.onnx")).graph
    read = {name for node in graph.node for name in node.input}
    not_read = {value.name for value in graph.input} - read
    assert not_read == ({"step"} if base == "sgd" else set())


def test_an_update_is_still_in_place(tmp_path: Path) -> None:
    captured = sx.capture(make(torch.float32, "adamw"), images(8, torch.float32))
    details = {
        device: sx.export(captured, tmp_path / device, device=device).details["in_place"]
        for device in ("cpu", "cuda")
    }
    assert details["cuda"] == details["cpu"]
    assert "" in details["cuda"].values()


def test_elementary_functions_become_arithmetic() -> None:
    """In float32, too, where CUDA has no kernel; against ATen, and none of their nodes is left."""
    inside = torch.linspace(-0.95, 0.95, 41)
    given = {"acosh": inside.abs() + 1.05, **dict.fromkeys(("tan", "cosh", "sinh"), inside * 1.4)}
    cases: dict[str, Case] = {
        name: (getattr(torch, name), [given.get(name, inside)]) for name in ELEMENTARY
    }
    tables = cuda_tables(PORTABLE)
    check(None, tables, **cases)
    left = {node.op_type for node in model_of(list(cases.values()), tables).graph}
    assert not left & set(NO_CUDA_KERNEL["onnxruntime-gpu 1.31.1"])
    before = {node.op_type for node in model_of(list(cases.values()), PORTABLE).graph}
    assert {name.capitalize() for name in ELEMENTARY} <= before


class WithArgMax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        return y * (1.0 + y.argmax(1, keepdim=True))


@pytest.mark.parametrize("target", TARGETS)
def test_an_operator_without_a_kernel(target: str, tmp_path: Path) -> None:
    """onnxruntime-training has none for ArgMax; the message says where it is."""
    torch.manual_seed(0)
    model = WithArgMax()
    step = sx.TrainStep(
        model, nn.CrossEntropyLoss(), sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    )
    captured = sx.capture(step, (randn(6, 4), torch.arange(6) % 3))
    if target == "onnx":
        sx.export(captured, tmp_path / "step", target=target, device="cuda")
        return
    with pytest.raises(sx.LoweringError) as caught:
        sx.export(captured, tmp_path / "step", target=target, device="cuda")
    message = str(caught.value)
    assert "onnxruntime-training 1.19.2 has no CUDA kernel for" in message
    assert "ArgMax of float32: node 'ascent/ArgMax'" in message
    assert Path(__file__).name in message
    assert "argmax(1, keepdim=True)" in message
    assert "CudaOptions(allow_cpu_nodes=True)" in message
    assert list(tmp_path.iterdir()) == []
    sx.export(captured, tmp_path / "step", target=target)


def test_a_device_that_is_none(tmp_path: Path) -> None:
    captured = sx.capture(make(torch.float32, "sgd"), images(8, torch.float32))
    for target in ("onnx", "torchscript"):
        with pytest.raises(sx.LoweringError, match=r"device='cuda:1': expected 'cpu' or 'cuda'"):
            sx.export(captured, tmp_path / "step", target=target, device="cuda:1")
    with pytest.raises(sx.LoweringError, match="not made for a device: export it without one"):
        sx.export(captured, tmp_path / "step", target="torchscript", device="cuda")


def test_the_table_names_operators_of_onnx() -> None:
    """A misspelt name would never match; no operator of a training form may be in it."""
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    for lacking in NO_CUDA_KERNEL.values():
        assert set(lacking) <= known
        assert not set(lacking) & set(SIGNATURES)
    assert set(MEANT_FOR.values()) == set(NO_CUDA_KERNEL)
