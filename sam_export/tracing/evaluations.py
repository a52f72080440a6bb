"""The programs that evaluate, as functions to be traced."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from sam_export.artifact import tree
from sam_export.artifact.contract import AVERAGE, SEED, STEP
from sam_export.artifact.philox import EVALUATION
from sam_export.step.batch import BatchLayout
from sam_export.step.call import call_with
from sam_export.step.draws import Draws
from sam_export.step.mixed_precision import widened
from sam_export.step.train_step import TrainStep
from sam_export.tracing.new_state import Produced
from sam_export.tracing.state import StateLayout


class Evaluations:
    """What a model gives in eval mode, at the weights or at their average.

    Args:
        step: The step.
        layout: Names of its batch.
        state: Its training state.

    Attributes:
        output_tree: Structure of the model's output, once `outputs` has run.
    """

    def __init__(self, step: TrainStep, layout: BatchLayout, state: StateLayout) -> None:
        self.step = step
        self.layout = layout
        self.state = state
        self.output_tree: Any = None

    def outputs(self, given: Mapping[str, Tensor]) -> list[Produced]:
        """The model's outputs."""
        with self._draws_of_evaluation(given), self.step.autocasting():
            inputs = [given[name] for name in self.layout.inputs]
            model = self.step.model
            outputs = call_with(
                model, self._model_state(given), lambda: self.layout.call(model, inputs), False
            )
        if self.step.autocast is not None:
            outputs = widened(outputs)
        leaves, self.output_tree = tree.flatten(outputs)
        return [(name, "output", leaf) for name, leaf in leaves]

    def loss(self, given: Mapping[str, Tensor]) -> list[Produced]:
        """The loss of a batch."""
        objective = self.step.objective(self.layout, [given[name] for name in self.layout.names])
        parameters, buffers = self.state.split(self._without_averages(given))
        with torch.enable_grad():  # the objective checks that the loss depends on a parameter
            leaves = {name: value.detach() for name, value in parameters.items()}
            for name in self.state.trained:
                leaves[name].requires_grad_()
            own = {name: value.clone() for name, value in buffers.items()}
            with self._draws_of_evaluation(given):
                loss = objective(leaves, own, lambda loss, _: loss)
        return [("loss", "metric", loss.detach())]

    @staticmethod
    def _without_averages(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a program that evaluates the average: that as the model's own state."""
        return {name.removeprefix(AVERAGE): value for name, value in given.items()}

    def _model_state(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parameters, buffers = self.state.split(self._without_averages(given))
        return {**parameters, **{name: value.clone() for name, value in buffers.items()}}

    def _draws_of_evaluation(self, given: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
        if SEED not in given:
            return contextlib.nullcontext()
        return Draws(given[SEED], given[STEP], same=False, first_stream=EVALUATION)
