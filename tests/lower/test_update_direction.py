"""``d`` of ``w - lr * d``, against the optimizers themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import sam_export as sx
from sam_export._compat.program import returning
from sam_export._compat.tracing import decomposed_by
from sam_export.artifact.contract import HYPER, NEXT
from sam_export.lower.update_direction import Direction, NotAffine, gradient_of
from sam_export.tracing.captured_step import CapturedStep

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "nadam": (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adamax": (torch.optim.Adamax, {}),
    "adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1}),
    "adadelta": (torch.optim.Adadelta, {"weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
}


def captured(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> CapturedStep:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    sam = sx.SAM(model.parameters(), kind, rho=0.05, lr=0.1, **options)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam)
    batch = (torch.randn(5, 4, dtype=torch.float64), torch.randint(0, 3, (5,)))
    for _ in range(3):  # slots that are not zero
        step(*batch)
    return sx.capture(step, batch, dynamic=None)


def parameters(step: CapturedStep) -> list[str]:
    return [item.name for item in step.contract.state if item.role == "parameter"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_direction(name: str) -> None:
    """At another learning rate than the one it was captured with."""
    step = captured(*OPTIMIZERS[name])
    spec = step.contract.program("step")
    names = parameters(step)

    def chosen(graph: fx.Graph, inputs: Any, results: Any) -> list[fx.Node]:
        given = dict(zip(spec.inputs, inputs, strict=True))
        made = dict(zip([output.name for output in spec.outputs], results, strict=True))
        direction = Direction(graph, given[HYPER + "lr"])
        found = []
        for name in names:
            new = made[NEXT + name]
            found += [new, direction.of(new, given[name]), gradient_of(new, name)]
        return found

    graph = returning(step.programs["step"], chosen)
    program = decomposed_by(graph, {}).module(check_guards=False)
    rate = 0.03
    state = {key: torch.from_numpy(value) for key, value in step.state.items()}
    state[HYPER + "lr"] = torch.tensor([rate], dtype=torch.float64)
    state[HYPER + "rho"] = torch.tensor([0.05], dtype=torch.float64)
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(0, 3, (5,))
    batch = dict(zip([item.name for item in step.contract.batch], (x, y), strict=True))
    results = list(program(*[(state | batch)[key] for key in spec.inputs]))
    for index, key in enumerate(names):
        new, direction, _ = results[3 * index : 3 * index + 3]
        moved = state[key] - rate * direction
        # Rounding of the larger of both; the direction itself is rounded a few times.
        scale = float(state[key].abs().max() + rate * direction.abs().max())
        assert float((moved - new).abs().max()) <= 8 * torch.finfo(torch.float64).eps * scale
        assert float(direction.abs().max()) > 0


class Squared(torch.optim.SGD):
    """Moves by the square of the learning rate."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad * group["lr"] * group["lr"] * -1.0)


class Shrunk(torch.optim.SGD):
    """Halves the weights, whatever the learning rate."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.5).add_(p.grad * group["lr"] * -1.0)


class Rooted(torch.optim.SGD):
    """Moves by the root of the learning rate."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * torch.as_tensor(group["lr"]).sqrt())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Squared, "product of two values"),
        (Shrunk, "with a learning rate of 0 the new parameter is not the old one"),
        (Rooted, "aten.sqrt"),
    ],
)
def test_another_function_of_the_learning_rate_is_seen(
    kind: type[torch.optim.Optimizer], reason: str
) -> None:
    step = captured(kind, {})
    spec = step.contract.program("step")
    name = parameters(step)[0]

    def chosen(graph: fx.Graph, inputs: Any, results: Any) -> list[fx.Node]:
        given = dict(zip(spec.inputs, inputs, strict=True))
        made = dict(zip([output.name for output in spec.outputs], results, strict=True))
        return [Direction(graph, given[HYPER + "lr"]).of(made[NEXT + name], given[name])]

    with pytest.raises(NotAffine, match=reason):
        returning(step.programs["step"], chosen)
