"""Where the update of a step goes when onnxruntime-training's stock API runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from sam_export._compat.program import returning
from sam_export.artifact.contract import HYPER, NEXT, ProgramSpec, TensorSpec
from sam_export.errors import LoweringError
from sam_export.lower.update_direction import Direction, NotAffine, depends_on, gradient_of
from sam_export.tracing.captured_step import CapturedStep

GRADIENT = "gradient."
"""Prefix of the outputs that go into the gradient buffers, before they are bound to them."""

Kind = Literal["gradient", "direction", "parameters"]


@dataclass(frozen=True)
class Plan:
    """How one step is split between the training model and the optimizer model.

    Attributes:
        kind: What the training model leaves behind. ``gradient``: ``g_adv`` in the gradient
            buffers; the stock optimizer does the update. ``direction``: ``d`` of
            ``w - lr * d`` in the gradient buffers, its own slots written in place; the stock SGD
            multiplies by the learning rate and subtracts. ``parameters``: the new parameters, in
            place; the stock SGD finds gradients of zero.
        optimizer: The operator of the optimizer model.
        attributes: Its attributes.
        reason: Why nothing simpler would do; empty for ``gradient``.
    """

    kind: Kind
    optimizer: Literal["AdamWOptimizer", "SGDOptimizerV2"]
    attributes: dict[str, float | int] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class TrainingProgram:
    """The step as the training model computes it.

    Attributes:
        plan: Where the update goes.
        program: A graph whose results are those of ``spec``.
        spec: Metrics and outputs, then ``gradient.<parameter>``, then the new state that the
            training model writes itself.
        trained: Parameters with a gradient buffer, in order.
    """

    plan: Plan
    program: torch.export.ExportedProgram
    spec: ProgramSpec
    trained: tuple[str, ...]


def training_program(captured: CapturedStep) -> TrainingProgram:
    """Chooses the simplest plan that does what the base optimizer does.

    Raises:
        LoweringError: The captured update does not show the gradients that it takes.
    """
    stock, why = _stock(captured)
    if stock is not None:
        return _built(captured, stock)
    if len(captured.contract.groups) == 1:
        plan = Plan("direction", "SGDOptimizerV2", reason=why)
        try:
            return _built(captured, plan)
        except NotAffine as error:
            why = f"{why}; it is not proportional to the learning rate either ({error})"
    return _built(captured, Plan("parameters", "SGDOptimizerV2", reason=why))


def _stock(captured: CapturedStep) -> tuple[Plan | None, str]:
    """The plan with the stock optimizer, or why it is not the same as the base optimizer."""
    base = captured.base_optimizer
    if len(base.groups) != 1:
        return None, f"{len(base.groups)} parameter groups, where the stock optimizer has one"
    options = base.groups[0]
    if options.get("maximize"):
        return None, "it maximizes"
    if base.kind is torch.optim.SGD:
        extra = [name for name in ("momentum", "weight_decay", "dampening") if options[name]]
        if extra:
            return None, f"SGD with {' and '.join(extra)}, which the stock SGD does not have"
        return Plan("gradient", "SGDOptimizerV2"), ""
    if base.kind in (torch.optim.AdamW, torch.optim.Adam):
        if options["amsgrad"]:
            return None, "amsgrad, which the stock AdamW does not have"
        decoupled = base.kind is torch.optim.AdamW or options.get("decoupled_weight_decay")
        if options["weight_decay"] and not decoupled:
            return None, "Adam with weight decay in the gradient, where AdamW decays the weights"
        first, second = options["betas"]
        numbers = (first, second, options["eps"], options["weight_decay"])
        if any(isinstance(value, torch.Tensor) for value in numbers):
            return None, "options that are tensors"
        attributes: dict[str, float | int] = {
            "alpha": float(first),
            "beta": float(second),
            "epsilon": float(options["eps"]),
            "weight_decay": float(options["weight_decay"]),
            "correct_bias": 1,
            "adam_mode": 0,  # torch.optim.AdamW; 1 is that of Hugging Face
        }
        return Plan("gradient", "AdamWOptimizer", attributes), ""
    return None, f"{base.kind.__name__}, which is no stock optimizer"


def _built(captured: CapturedStep, plan: Plan) -> TrainingProgram:
    contract = captured.contract
    spec = contract.program("step")
    parameters = {item.name: item for item in contract.state if item.role == "parameter"}
    trained = tuple(state for state in spec.feeds.values() if state in parameters)
    slots = {item.name for item in contract.state if item.role == "slot"}
    if not trained:
        raise LoweringError("The step trains no parameter.")
    buffered: list[TensorSpec] = []
    if plan.kind != "parameters":
        buffered = [
            TensorSpec(GRADIENT + name, "output", "float32", parameters[name].shape)
            for name in trained
        ]

    def written(output: TensorSpec) -> bool:
        state = spec.feeds[output.name]
        if plan.kind == "gradient":
            return state not in parameters and state not in slots
        return plan.kind == "parameters" or state not in parameters

    results = [output for output in spec.outputs if output.name not in spec.feeds]
    state = [output for output in spec.outputs if output.name in spec.feeds and written(output)]

    def chosen(
        graph: fx.Graph, inputs: Any, nodes: Any
    ) -> list[fx.Node]:  # the nodes of results, buffered and state
        given = dict(zip(spec.inputs, inputs, strict=True))
        made = dict(zip([output.name for output in spec.outputs], nodes, strict=True))
        buffers: list[fx.Node] = []
        if plan.kind == "gradient":
            buffers = [gradient_of(made[NEXT + name], name) for name in trained]
        elif plan.kind == "direction":
            rate = given[HYPER + "lr"]
            for output in state:
                if depends_on(made[output.name], {rate}):
                    raise NotAffine(f"{output.name} depends on the learning rate")
            direction = Direction(graph, rate)
            buffers = [direction.of(made[NEXT + name], given[name]) for name in trained]
        return [
            *(made[output.name] for output in results),
            *buffers,
            *(made[output.name] for output in state),
        ]

    program = returning(captured.programs["step"], chosen)
    outputs = (*results, *buffered, *state)
    feeds = {output.name: spec.feeds[output.name] for output in state}
    return TrainingProgram(plan, program, ProgramSpec("step", spec.inputs, outputs, feeds), trained)
