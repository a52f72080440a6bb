"""The onnx target as a whole: what it refuses, and what its file looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from tests.step.test_sam import batches, small_model
from tests.step.test_train_step import WithStatistics


def make(model: nn.Module, **semantics: Any) -> sx.TrainStep:
    sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    return sx.TrainStep(model, nn.CrossEntropyLoss(), sam, semantics=sx.Semantics(**semantics))


@torch.library.custom_op("sam_export_tests::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    """An operator of the user's own, which nobody can lower."""
    return x.sin()


@torch.library.custom_op("sam_export_tests::twist_backward", mutates_args=())
def twist_backward(grad: Tensor, x: Tensor) -> Tensor:
    return grad * x.cos()


twist.register_fake(torch.empty_like)
twist_backward.register_fake(lambda grad, x: torch.empty_like(x))
twist.register_autograd(
    lambda ctx, grad: twist_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.twisted = Twisted()

    def forward(self, x: Tensor) -> Tensor:
        image = self.twisted(self.conv(x))
        values = torch.linalg.eigvalsh(self.conv.weight[:, 0] @ self.conv.weight[:, 0].mT)
        return image.mean((2, 3)) + values.mean()


class Twisted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return twist(x)


def test_an_unknown_operator_stops_before_anything_is_written(tmp_path: Path) -> None:
    """All missing operators at once, each with its schema and the module it comes from."""
    captured = sx.capture(make(Unsupported()), (torch.randn(4, 1, 10, 10), torch.zeros(4).long()))
    with pytest.raises(sx.LoweringError) as caught:
        sx.export(captured, tmp_path / "step", target="onnx")
    message = str(caught.value)
    for schema in ("sam_export_tests::twist(Tensor x)", "sam_export_tests::twist_backward(Tensor"):
        (line,) = (line for line in message.splitlines() if schema in line)
        assert line.endswith("(2x, in ascent/twisted)")  # of both passes
    assert "aten::_linalg_eigh" in message
    # The user's line of a forward operator, and of the forward operator that a gradient is of.
    assert message.count(f"at {__file__}:") == 3, message
    assert message.count("in forward: return twist(x)") == 2
    assert "in forward: values = torch.linalg.eigvalsh(" in message
    assert "docs/add_an_op.md" in message
    assert list(tmp_path.iterdir()) == []


def test_random_operators_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)

    captured = sx.capture(make(WithStatistics(), generator="torch"), batches(1)[0])
    with pytest.raises(sx.LoweringError, match=r"torch's own generator \(aten\.") as caught:
        sx.export(captured, tmp_path / "step", target="onnx")
    assert 'generator="philox"' in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Refused(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        first = nn.functional.avg_pool2d(y[None], 1)[0]
        return first + torch.nn.functional.adaptive_max_pool1d(y[None], 3)[0]


def test_operators_with_other_arguments_are_all_named(tmp_path: Path, monkeypatch: Any) -> None:
    """A form that refuses its arguments does not hide the next one."""
    from sam_export.lower.onnx_ops.table import FORMS

    def refuse(*_: Any, **__: Any) -> Any:
        raise sx.LoweringError("Not for these arguments.")

    for name in ("avg_pool2d", "avg_pool2d_backward", "gather"):
        monkeypatch.setitem(FORMS, getattr(torch.ops.aten, name).default, refuse)
    captured = sx.capture(make(Refused(5, 3)), batches(1)[0])
    with pytest.raises(sx.LoweringError) as caught:
        sx.export(captured, tmp_path / "step", target="onnx")
    message = str(caught.value)
    for name in ("avg_pool2d", "avg_pool2d_backward", "gather"):
        assert f"aten::{name}(" in message
    assert message.count("Not for these arguments.") == 3
    assert message.count("nn.functional.avg_pool2d(y[None], 1)") == 2
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_target_lists_the_known_ones(tmp_path: Path) -> None:
    captured = sx.capture(make(small_model()), batches(1)[0])
    with pytest.raises(
        sx.LoweringError,
        match=r"no target 'tflite'.*onnx, onnx-training, ort-artifacts, torch-compile",
    ):
        sx.export(captured, tmp_path / "step", target="tflite")


def test_a_capture_that_is_not_portable_is_refused(tmp_path: Path) -> None:
    captured = sx.capture(make(small_model()), batches(1)[0], portable=False)
    with pytest.raises(sx.LoweringError, match="portable=True"):
        sx.export(captured, tmp_path / "step", target="onnx")


def test_the_file_is_portable_readable_and_the_same_each_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    captured = sx.capture(make(model), batches(1)[0])
    first = sx.export(captured, tmp_path / "first", target="onnx")
    second = sx.export(captured, tmp_path / "second", target="onnx")
    assert first.file("step").read_bytes() == second.file("step").read_bytes()

    graph = onnx.load(first.file("step"))
    assert graph.ir_version == 10
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 18)]
    assert not graph.functions
    assert [v.name for v in graph.graph.input] == list(first.contract.program("step").inputs)
    assert graph.graph.input[-2].type.tensor_type.shape.dim[0].dim_param == "batch"
    names = [node.name for node in graph.graph.node]
    assert len(set(names)) == len(names)
    assert "ascent/0/Gemm" in names
    assert any(name.startswith("descent/1/BatchNormalization") for name in names)
    assert names[-1] == "update/If"
    assert set(first.details["in_place"].values()) == {""}


class Inexact(nn.Linear):
    """An operator for which the runtime has no float64 kernel, put in behind our forms."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).cos()


@pytest.mark.skipif(
    not ort.__version__.startswith("1.19"), reason="newer ones may have this kernel"
)
def test_a_missing_kernel_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    from onnxscript import opset18 as op

    from sam_export.lower.onnx_ops.table import FORMS, OWN_DECOMPOSITIONS

    monkeypatch.delitem(OWN_DECOMPOSITIONS, torch.ops.aten.cos.default)
    monkeypatch.setitem(FORMS, torch.ops.aten.cos.default, lambda x: op.Cos(x))
    model = Inexact(5, 3).double()
    x, y = batches(1)[0]
    sx.export(sx.capture(make(model), (x.double(), y)), tmp_path / "step", target="onnx")
    with pytest.raises(
        sx.RuntimeUnavailableError, match=r"kernel for the node '\S*Cos\S*'.*float64"
    ):
        sx.load(tmp_path / "step")


@pytest.mark.parametrize("layer", [nn.LayerNorm, nn.BatchNorm1d])
def test_a_float16_step_is_eagers(layer: Any, tmp_path: Path) -> None:
    """Changes of weights, to a few roundings of a float16 gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), layer(16), nn.ReLU(), nn.Linear(16, 3)).half()
    x, y = batches(1)[0]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = make(model)
    sx.export(sx.capture(step, (x.half(), y)), tmp_path / "step", target="onnx")
    session = sx.load(tmp_path / "step")
    found = session.step(x.half(), y)
    step(x.half(), y)
    assert bool(found.finite)
    for name, value in model.named_parameters():
        change = (value.detach() - before[name]).float()
        error = torch.from_numpy(session.state[name]).float() - value.detach().float()
        weights = before[name].float().norm()
        if name != "0.bias" or layer is not nn.BatchNorm1d:  # there the true gradient is zero
            assert float(error.norm()) <= 0.02 * float(change.norm()) + 2e-3 * float(weights), name


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(10, 5, mode="sum", scale_grad_by_freq=True)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(self.last.weight[:, :3]) + self.last(self.bags(x))


def test_what_a_decomposition_refuses_is_named_with_the_rest(tmp_path: Path) -> None:
    step = make(Bags())
    captured = sx.capture(step, (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4).long()))
    with pytest.raises(sx.LoweringError) as caught:
        sx.export(captured, tmp_path / "step", target="onnx")
    message = str(caught.value)
    assert "aten::_embedding_bag_backward(" in message
    assert "embedding_bag(scale_grad_by_freq=True) is refused: PyTorch's own" in message
    assert "aten::_linalg_eigh" in message
    assert "While executing" not in message
    assert "return torch.linalg.eigvalsh(self.last.weight" in message


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(8, 3))
    batch = (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4).long())
    sx.export(sx.capture(make(model), batch), tmp_path / "step", target="onnx")
    assert capfd.readouterr() == ("", "")


class Scanned(nn.Linear):
    """A running maximum over the batch: its number of passes depends on the batch's size."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cummax(super().forward(x), 0)[0]


def test_a_loop_over_a_symbolic_size_is_refused(tmp_path: Path) -> None:
    """It would be right for the example's size only, without a word."""
    step = make(Scanned(5, 3))
    captured = sx.capture(step, batches(1)[0])
    with pytest.raises(sx.LoweringError, match=r"needs fixed sizes in ONNX.*only be right while"):
        sx.export(captured, tmp_path / "step", target="onnx")
    fixed = sx.capture(step, batches(1)[0], dynamic=None)
    sx.export(fixed, tmp_path / "step", target="onnx")
    found = sx.load(tmp_path / "step").step(*batches(1)[0])
    assert float(found.loss) == pytest.approx(float(step(*batches(1)[0]).loss), rel=1e-6)
