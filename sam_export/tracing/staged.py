"""The three stages of a step as functions to be traced."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from sam_export._compat import origins
from sam_export.artifact import tree
from sam_export.artifact.contract import (
    CLIPPED_METRIC,
    GRADIENT,
    HYPER,
    MOVED,
    PART,
    PERTURBED_GRADIENT,
    RUNNING,
    SCALED_METRIC,
    SEED,
    STARTED,
    STEP,
    HyperSpec,
    ProgramSpec,
    Role,
    TensorSpec,
)
from sam_export.artifact.philox import STEPS_PER_PART, STREAMS_PER_DRAW
from sam_export.errors import CaptureError, StepConfigError
from sam_export.step.batch import BatchLayout
from sam_export.step.draws import Draws
from sam_export.step.staged import (
    ascent_stage,
    descent_stage,
    needs_both_gradients,
    update_stage,
)
from sam_export.step.train_step import TrainStep
from sam_export.tracing.new_state import Produced, new_state, scaler_of
from sam_export.tracing.state import StateLayout, memory_name

Function = Callable[[Mapping[str, Tensor]], list[Produced]]


class Stages:
    """The stages of one step: what each of them reads, and what it computes.

    Args:
        step: The step.
        layout: Names of its batch.
        state: Its training state.
        hyper: Its hyper-parameters.
        return_outputs: Whether the first stage returns the model's output, too.
        moved: State that a whole step changes. Buffers among it go from stage to stage, and only
            the last one stores them.
    """

    def __init__(
        self,
        step: TrainStep,
        layout: BatchLayout,
        state: StateLayout,
        hyper: Sequence[HyperSpec],
        return_outputs: bool,
        moved: Collection[str],
    ) -> None:
        self._step = step
        self._layout = layout
        self._state = state
        self._hyper = tuple(hyper)
        self._return_outputs = return_outputs
        self._draws_before = 0
        buffers = [s for s in state.specs if s.role == "buffer" and s.name in moved]
        trained = [s for s in state.specs if s.name in state.trained]
        self._gradients = _carried("gradient", GRADIENT, trained)
        self._perturbed = _carried("gradient", PERTURBED_GRADIENT, trained)
        self._running = _carried("running", RUNNING, buffers)
        self._part = (TensorSpec(PART, "part", "int64", ()),)

    @property
    def all_carried(self) -> tuple[TensorSpec, ...]:
        """Everything that may go from stage to stage, or say which part of a batch it is."""
        return (*self._part, *self._running, *self._gradients, *self._perturbed)

    def carried(self, program: str) -> tuple[TensorSpec, ...]:
        """What a stage may be given besides state, hyper-parameters and batch."""
        if program == "ascent":
            return (*self._part, *self._running)
        if program == "descent":
            return (*self._part, *self._running, *self._gradients)
        both = self._gradients if needs_both_gradients(self._step) else ()
        return (*self._running, *both, *self._perturbed)

    def state(self, program: str) -> tuple[TensorSpec, ...]:
        """State that a stage may read; of buffers that go from stage to stage only the last."""
        own = {spec.name.removeprefix(RUNNING) for spec in self._running}
        return tuple(s for s in self._state.specs if program == "update" or s.name not in own)

    def hyper(self, program: str) -> tuple[HyperSpec, ...]:
        """Hyper-parameters that a stage may read."""
        return () if program == "ascent" else self._hyper

    def values(self, specs: Sequence[TensorSpec]) -> list[Tensor]:
        """An example for each carried tensor."""
        start = self._state.values
        return [
            start[spec.name.removeprefix(RUNNING)]
            if spec.role == "running"
            else torch.zeros([int(n) for n in spec.shape], dtype=getattr(torch, spec.dtype))
            for spec in specs
        ]

    def function(self, program: str) -> Function:
        """What a stage computes, from tensors by name."""
        functions = {"ascent": self._ascent, "descent": self._descent, "update": self._update}
        return functions[program]

    def check(self, programs: Mapping[str, ProgramSpec], random_ops: Sequence[str]) -> None:
        """Refuses stages that do not belong together.

        Args:
            programs: The stages by name, without inputs that nothing reads.
            random_ops: Operators in them that draw from torch's generator.

        Raises:
            CaptureError: ``descent`` or ``update`` does not read a gradient.
            StepConfigError: Both passes are to draw the same from torch's generator.
        """
        wanted = {"descent": self._gradients, "update": self._perturbed}
        for program, specs in wanted.items():
            unread = [spec.name for spec in specs if spec.name not in programs[program].inputs]
            if unread:
                raise CaptureError(f"{program} of the captured step does not read {unread[0]!r}.")
        if random_ops and self._step.semantics.randomness == "same":
            raise StepConfigError(
                f"staged=True: the model draws from torch's own generator ({', '.join(random_ops)})"
                ", and between two stages nothing brings the same draws again. Use "
                'Semantics(generator="philox"), or randomness="fresh".'
            )

    # -- the three functions ----------------------------------------------------------------------

    def _ascent(self, given: Mapping[str, Tensor]) -> list[Produced]:
        paths = origins.ModulePaths(self._step.model)
        parameters, buffers = self._state.split(self._with_running(given))
        draws = self._draws(given, 0)
        with paths.recording():
            found = ascent_stage(
                self._step, parameters, buffers, self._layout, self._batch(given),
                paths.at, paths.watch, draws, scaler_of(self._step, given),
            )  # fmt: skip
        self._draws_before = draws.count if draws is not None else 0
        result: list[Produced] = [("loss", "metric", found.loss)]
        if self._return_outputs:
            leaves = tree.flatten(found.outputs)[0]
            result += [(name, "output", leaf) for name, leaf in leaves]
        return [
            *result,
            *self._produced(GRADIENT, found.gradients),
            *self._moved(found.buffers),
        ]

    def _descent(self, given: Mapping[str, Tensor]) -> list[Produced]:
        paths = origins.ModulePaths(self._step.model)
        parameters, buffers = self._state.split(self._with_running(given))
        is_same = self._step.semantics.randomness == "same"
        with paths.recording():
            found = descent_stage(
                self._step, parameters, buffers, self._of(GRADIENT, given), self._hypers(given),
                self._layout, self._batch(given), paths.at, paths.watch,
                self._draws(given, 0 if is_same else self._draws_before),
                scaler_of(self._step, given), self._state.slots(given, "memory"),
                given.get(STARTED),
            )  # fmt: skip
        names = ("perturbed_loss", "grad_norm", "perturbation_norm")
        result: list[Produced] = [(name, "metric", getattr(found, name)) for name in names]
        result += self._produced(PERTURBED_GRADIENT, found.gradients)
        if self._step.semantics.running_stats == "both":
            result += self._moved(found.buffers)
        return result

    def _update(self, given: Mapping[str, Tensor]) -> list[Produced]:
        paths = origins.ModulePaths(self._step.model)
        parameters, buffers = self._state.split(given)
        with paths.recording():
            found = update_stage(
                self._step, parameters, self._of(PERTURBED_GRADIENT, given),
                self._of(GRADIENT, given), self._state.slots(given), self._hypers(given),
                self._state.slots(given, "memory"), paths.at, given.get(STARTED),
                self._state.starts_specially,
            )  # fmt: skip
        result: list[Produced] = [("finite", "metric", found.finite)]
        if found.perturbed_grad_norm is not None:
            result.append((CLIPPED_METRIC, "metric", found.perturbed_grad_norm))
        scaler = scaler_of(self._step, given)
        if scaler is not None:
            result.append((SCALED_METRIC, "metric", scaler.shown))
        after = {**parameters, **buffers, **self._of(RUNNING, given)}
        after |= {**found.parameters, **self._state.flat(found.slots)}
        after |= {
            memory_name(name, key): value
            for name, own in found.memory.items()
            for key, value in own.items()
        }
        return result + new_state(self._step, self._state, given, after, found.finite, scaler)

    def _batch(self, given: Mapping[str, Tensor]) -> list[Tensor]:
        return [given[name] for name in self._layout.names]

    def _hypers(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {spec.name: given[HYPER + spec.name] for spec in self._hyper}

    def _with_running(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All state, with the buffers that another stage has left."""
        return {**given, **self._of(RUNNING, given)}

    def _produced(self, prefix: str, gradients: Mapping[str, Tensor]) -> list[Produced]:
        return [(prefix + name, "gradient", gradients[name]) for name in self._state.trained]

    def _moved(self, buffers: Mapping[str, Tensor]) -> list[Produced]:
        names = [spec.name.removeprefix(RUNNING) for spec in self._running]
        return [(MOVED + name, "running", buffers[name]) for name in names]

    @staticmethod
    def _of(prefix: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Carried tensors of one kind, by the name of the parameter or buffer."""
        return {
            name.removeprefix(prefix): value
            for name, value in given.items()
            if name.startswith(prefix)
        }

    def _draws(self, given: Mapping[str, Tensor], draws_before: int) -> Draws | None:
        """The random numbers of one pass over one part of a batch."""
        if SEED not in given:
            return None
        number = given[STEP] + given[PART] * STEPS_PER_PART
        is_same = self._step.semantics.randomness == "same"
        return Draws(given[SEED], number, is_same, STREAMS_PER_DRAW * draws_before)


def _carried(role: Role, prefix: str, specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(prefix + spec.name, role, spec.dtype, spec.shape) for spec in specs)
