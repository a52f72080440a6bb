"""What `capture` refuses, and that it names the line."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export.tracing.checks import refuse_mutation, refuse_wrong_flow
from tests.step.test_sam import batches, small_model
from tests.tracing.test_capture import make


class ReadsAValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line to be named
            x = -x
        return self.net(x)


class ReadsAnItem(ReadsAValue):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.net.bias[0].item()  # an item is read


class BranchesOnTheBatch(ReadsAValue):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.shape[0] > 4 else self.net(-x)  # a branch on the size


class FixesTheBatch(ReadsAValue):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + torch.ones(6, 1)  # six examples


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (ReadsAValue, r"depends on the value of a tensor.*if x\.sum\(\) > 0"),
        (ReadsAnItem, r"depends on the value of a tensor.*an item is read"),
        (BranchesOnTheBatch, r"branch that depends on a symbolic size.*a branch on the size"),
        (FixesTheBatch, r"'batch' is symbolic, but the model fixes it to 6.*six examples"),
    ],
)
def test_what_cannot_be_captured_names_the_line(build: type[nn.Module], message: str) -> None:
    with pytest.raises(sx.CaptureError, match="(?s)" + message) as caught:
        sx.capture(make(build()), batches(1)[0])
    assert __file__ in str(caught.value)


def test_a_model_that_fixes_the_batch_can_be_captured_without_symbols() -> None:
    contract = sx.capture(make(FixesTheBatch()), batches(1)[0], dynamic=None).contract
    assert (contract.batch[0].shape, contract.dims) == ((6, 5), {})


def test_bad_arguments_are_refused() -> None:
    x, y = batches(1)[0]
    step = make(small_model())
    with pytest.raises(sx.StepConfigError, match="expected 'batch'"):
        sx.capture(step, (x, y), dynamic="time")
    with pytest.raises(sx.StepConfigError, match="dynamic names z"):
        sx.capture(step, (x, y), dynamic={"z": {0: "batch"}})
    with pytest.raises(sx.StepConfigError, match="dimension 3"):
        sx.capture(step, (x, y), dynamic={"input": {3: "batch"}})
    with pytest.raises(sx.StepConfigError, match="one name stands for one size"):
        sx.capture(step, (x, y), dynamic={"input": {0: "batch", 1: "batch"}})
    with pytest.raises(sx.CaptureError, match="bfloat16"):
        sx.capture(make(small_model().bfloat16()), (x.bfloat16(), y))
    step.model.eval()
    with pytest.raises(sx.CaptureError, match=r"model\.train\(\)"):
        sx.capture(step, (x, y))


def test_the_checks_catch_a_graph_that_is_no_sam_step() -> None:
    """The check on itself: rho cut out of the graph, and a mutating operator put in."""
    captured = sx.capture(make(small_model()), batches(1)[0])
    spec = captured.contract.program("step")
    graph = copy.deepcopy(captured.programs["step"].graph)
    rho = graph.find_nodes(op="placeholder")[spec.inputs.index("hyper.rho")]
    lr = graph.find_nodes(op="placeholder")[spec.inputs.index("hyper.lr")]
    names = [output.name for output in spec.outputs]
    refuse_wrong_flow(graph, spec.inputs, names, captured.contract, captured.semantics)
    rho.replace_all_uses_with(lr)
    with pytest.raises(sx.CaptureError, match="perturbed_loss.*rho"):
        refuse_wrong_flow(graph, spec.inputs, names, captured.contract, captured.semantics)
    relu = graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)[0]
    relu.target = torch.ops.aten.tanh_.default
    with pytest.raises(sx.CaptureError, match="in place"):
        refuse_mutation(graph)
