"""A step whose model is on another device is traced on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sam_export as sx
from sam_export._compat import tracing
from sam_export.errors import CaptureError, StepConfigError
from sam_export.tracing.on_cpu import constants_on_cpu


class Shifted(nn.Module):
    """With a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.shift = torch.linspace(0, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.shift  # type: ignore[no-any-return]


def on_a_pretended_gpu(**options: Any) -> sx.TrainStep:
    """A step of fake tensors of a device that is not there."""
    model, loss = Shifted(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0]))
    for held in (vars(model), model.linear._parameters, loss._buffers):
        for name, value in held.items():
            if isinstance(value, Tensor):
                fake = torch.empty(value.shape, device="cuda:0")
                held[name] = nn.Parameter(fake) if isinstance(value, nn.Parameter) else fake
    sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    return sx.TrainStep(model, loss, sam, **options)


def test_constants_come_to_the_cpu_and_go_back() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = on_a_pretended_gpu()
        model: Any = step.model
        shift, weight = model.shift, step.loss_fn.weight
        assert {str(shift.device), str(weight.device)} == {"cuda:0"}
        with constants_on_cpu(step):
            assert {str(model.shift.device), str(step.loss_fn.weight.device)} == {"cpu"}
            # A trace puts its own in place of these.
            assert str(model.linear.weight.device) == "cuda:0"
        assert model.shift is shift
        assert step.loss_fn.weight is weight


def test_autocast_of_another_device_is_refused() -> None:
    """Its list of operators is another one, so the graph would not be what eager does."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = on_a_pretended_gpu(autocast=torch.bfloat16)
        with (
            pytest.raises(StepConfigError, match=r"on cuda:0 and the step has autocast"),
            constants_on_cpu(step),
        ):
            pass


def test_constants_of_a_graph_come_to_the_cpu() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        graph = torch.fx.symbolic_trace(Shifted())
        graph.shift = torch.empty(4, device="cuda:0")
        graph.linear.weight = nn.Parameter(torch.empty(4, 4, device="cuda:0"))
        tracing.bring_constants_to_cpu(graph)
        assert {str(graph.shift.device), str(graph.linear.weight.device)} == {"cpu"}
        assert isinstance(graph.linear.weight, nn.Parameter)


def test_a_tensor_of_another_device_says_what_to_do() -> None:
    class Fixed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.ones(4, device="meta")

    model = Fixed(4, 4)
    sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    step = sx.TrainStep(model, nn.MSELoss(), sam)
    with pytest.raises(CaptureError, match=r'(?s)device="meta".*cpu and meta.*device=x\.device'):
        sx.capture(step, (torch.ones(2, 4), torch.ones(2, 4)))


def test_a_loss_and_a_hook_reach_into_the_model() -> None:
    """The weights that they see are those of the step; a copy of the model would lose these."""
    torch.manual_seed(0)
    model = Shifted().double()
    model.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    model.register_forward_hook(lambda module, _, output: output * module.scale)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        penalty = 10 * model.linear.weight.square().sum()
        return nn.functional.cross_entropy(output, target) + penalty

    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.01)
    step = sx.TrainStep(model, loss, sam)
    batch = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    session = sx.load(sx.capture(step, batch), target="torchscript")
    for _ in range(2):
        found, expected = session.step(*batch), step(*batch)
        assert float(found.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-12)
    for name, value in model.named_parameters():
        torch.testing.assert_close(torch.from_numpy(session.state[name]), value.detach())
