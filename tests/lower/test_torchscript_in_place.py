"""What may be overwritten: each condition of `plan_in_place` by a graph that needs it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import sam_export as sx
from sam_export.lower import torchscript_methods
from sam_export.lower.torchscript_in_place import Plan, in_place_form, plan_in_place

aten = torch.ops.aten
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
}


def planned(
    function: Callable[..., Sequence[Tensor]],
    count: int = 2,
    replaced: Sequence[int] = (),
    shape: tuple[int, ...] = (3, 3),
) -> tuple[Plan, list[fx.Node]]:
    """The plan for a function of ``count`` tensors, and the operators in order."""

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Sequence[Tensor]:
            return function(*tensors)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        given = tuple(torch.randn(shape) for _ in range(count))
        program = torch.export.export(Module(), given, strict=False).run_decompositions({})
    graph = program.graph
    inputs = graph.find_nodes(op="placeholder")
    (output,) = graph.find_nodes(op="output")
    order = [node for node in graph.nodes if node.op == "call_function"]
    plan = plan_in_place(
        order, set(output.args[0]), inputs, {inputs[index] for index in replaced}, set(order)
    )
    return plan, order


def overwriting(*arguments: object, **named: object) -> list[str]:
    plan, _ = planned(*arguments, **named)  # type: ignore[arg-type]
    return [f"{node.name}:{index}" for node, index in plan.overwrites.items()]


def test_a_temporary_is_overwritten_at_its_last_use() -> None:
    assert overwriting(lambda a, b: [((a * b) + b).neg()]) == ["add:0", "neg:0"]


def test_the_second_operand_of_a_commutative_operator() -> None:
    assert overwriting(lambda a, b: [a + a * b]) == ["add:1"]
    assert overwriting(lambda a, b: [a - a * b]) == []
    assert overwriting(lambda a, b: [torch.add(a, a * b, alpha=2)]) == []


def test_inputs_are_overwritten_only_when_they_are_replaced() -> None:
    def step(a: Tensor, b: Tensor) -> list[Tensor]:
        return [a + b]

    assert overwriting(step) == []
    assert overwriting(step, replaced=[0]) == ["add:0"]
    assert overwriting(step, replaced=[1]) == ["add:1"]


def test_nothing_is_overwritten_that_is_read_later() -> None:
    def later(a: Tensor, b: Tensor) -> list[Tensor]:
        c = a * b
        return [c + b, c.exp()]

    assert overwriting(later) == ["exp:0"]

    def through_a_view(a: Tensor, b: Tensor) -> list[Tensor]:
        c = a * b
        view = c.t()
        return [c + b, view.exp()]

    assert overwriting(through_a_view) == ["exp:0"]


def test_nothing_is_overwritten_that_leaves_the_graph() -> None:
    def leaves(a: Tensor, b: Tensor) -> list[Tensor]:
        c = a * b
        return [c.t(), c + b]

    assert overwriting(leaves) == []


def test_nothing_is_overwritten_that_another_operand_shares() -> None:
    def crossed(a: Tensor, b: Tensor) -> list[Tensor]:
        c = a * b
        return [c + c.t()]

    def twice(a: Tensor, b: Tensor) -> list[Tensor]:
        c = a * b
        return [c * c]

    assert overwriting(crossed) == []
    assert overwriting(twice) == ["mul_1:0"]


def test_the_form_must_stay() -> None:
    assert overwriting(lambda a, b: [(a[0] * b[0]) + b]) == []  # the operand is smaller
    assert overwriting(lambda a, b: [(a * b) > 0]) == []  # the result is bool
    assert overwriting(lambda a, b: [(a[0] * 2).expand(3, 3) + b]) == []  # elements share memory
    assert overwriting(lambda a, b: [(a * b).sum(0)]) == []  # not elementwise


def test_what_an_unsafe_view_shares_counts_as_shared() -> None:
    def unsafe(a: Tensor, b: Tensor) -> list[Tensor]:
        c = a * b
        d = aten._unsafe_view(c, [9])
        return [d + 1, c.exp()]

    assert overwriting(unsafe) == ["exp:0"]


def test_what_an_unsafe_split_shares_counts_as_shared() -> None:
    def unsafe(a: Tensor, b: Tensor) -> list[Tensor]:
        c = a * b
        first, second = torch.unsafe_split_with_sizes(c, [1, 2])
        return [first.exp(), second + 1, c + 1]

    assert overwriting(unsafe) == ["add_1:0"]


def test_memory_is_traced_to_its_origin() -> None:
    def step(a: Tensor, b: Tensor) -> list[Tensor]:
        c = a * b
        return [(c + 1).t(), b.t()]

    plan, order = planned(step)
    views = [node for node in order if len(node.all_input_nodes) == 1 and "add" not in node.name]
    assert [plan.memory[node].op for node in views] == ["call_function", "placeholder"]
    assert plan.memory[views[0]].name == "mul"


def test_a_chain_on_a_replaced_input_stays_that_input() -> None:
    plan, order = planned(lambda a, b: [a.mul(0.9).add(b)], replaced=[0])
    assert [node.name for node in plan.overwrites] == ["mul", "add"]
    assert all(plan.whole[node].op == "placeholder" for node in order)


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        (aten.add.Tensor, aten.add_.Tensor),
        (aten.addcdiv.default, aten.addcdiv_.default),
        (aten.lerp.Scalar, aten.lerp_.Scalar),
        (aten.mm.default, None),
        (aten.relu.default, aten.relu_.default),
        (aten.where.self, None),
        (len, None),
    ],
)
def test_in_place_forms(operator: object, expected: object) -> None:
    assert in_place_form(operator) is expected


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_an_update_that_is_selected_is_the_one_that_is_made_in_place(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on an accelerator, run on the CPU: bit for bit, through a step that is skipped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 3))
    kind, options = OPTIMIZERS[optimizer]
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sx.SAM(model.parameters(), kind, **options))
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    captured = sx.capture(step, (x, y))
    in_place = sx.load(captured, target="torchscript")
    monkeypatch.setattr(torchscript_methods, "READS_FINITE", 'device.type != "cpu"')
    selected = sx.load(captured, target="torchscript")
    for batch in (x, torch.full_like(x, torch.nan), -x, x.flip(0)):
        before = selected.state
        results = [session.step(batch, y) for session in (in_place, selected)]
        finite = bool(batch.isfinite().all())
        assert [bool(result.finite) for result in results] == [finite, finite]
        after = selected.state
        moved = {name for name, value in after.items() if not np.array_equal(value, before[name])}
        assert ("0.weight" in moved) == finite
        assert finite or moved == {"counter.step"}
        for name, value in in_place.state.items():
            assert np.array_equal(after[name], value), name
