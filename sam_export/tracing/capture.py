"""`capture`: a `TrainStep` as named functional graphs with one contract."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sam_export._compat import origins
from sam_export._compat.precision import older_settings_readable
from sam_export.artifact import tree
from sam_export.artifact.contract import (
    AVERAGE,
    BY_EXAMPLES,
    HYPER,
    NEXT,
    SCALED_METRIC,
    SEED,
    STAGE,
    STAGES,
    STARTED,
    STEP,
    TRAINING,
    HyperSpec,
    ProgramSpec,
    StepContract,
    TensorSpec,
    metrics_of,
)
from sam_export.errors import CaptureError
from sam_export.step.batch import BatchLayout, unwrapped
from sam_export.step.draws import Draws
from sam_export.step.hyper import baked_of
from sam_export.step.mixed_precision import autocast_name
from sam_export.step.perturbation import name_of
from sam_export.step.staged import check_staged
from sam_export.step.train_step import TrainStep
from sam_export.tracing.captured_step import BaseOptimizer, CapturedStep
from sam_export.tracing.checks import refuse_mutation, refuse_other_state, refuse_wrong_flow
from sam_export.tracing.dynamic import Dynamic, at_least_two, dims_of
from sam_export.tracing.evaluations import Evaluations
from sam_export.tracing.losses import TraceableLosses
from sam_export.tracing.new_state import Produced, new_state, scaler_of
from sam_export.tracing.on_cpu import constants_on_cpu
from sam_export.tracing.randomness import (
    drawn_nodes,
    frozen_draws_refused,
    random_nodes,
    share_draws,
    share_dropout_factors,
)
from sam_export.tracing.sizes import multiples_of, smallest_sizes
from sam_export.tracing.staged import Stages
from sam_export.tracing.state import StateLayout, dtype_name, memory_name, state_layout
from sam_export.tracing.surroundings import eval_mode, kernels
from sam_export.tracing.trace import exported, traced
from sam_export.tracing.unchanged import drop_unchanged


def capture(
    step: TrainStep,
    example_batch: Sequence[Any] | Mapping[str, Any],
    dynamic: Dynamic = "batch",
    *,
    return_outputs: bool = False,
    portable: bool = True,
    stages: bool = False,
    dynamic_hyper: Collection[str] = (),
    staged: bool = False,
) -> CapturedStep:
    """Traces one whole SAM step into one functional ATen graph.

    The model, the optimizer and torch's generators are left as they were. They may be on CUDA: the
    graph is traced on the CPU in any case, and runs on either.

    Args:
        step: The step to capture. Its model must be in training mode; submodules that were put
            into eval mode (frozen BatchNorm) stay in it.
        example_batch: A batch as the step takes it; only names, dtypes and shapes matter.
        dynamic: Which sizes stay symbolic: ``"batch"`` (dimension 0 of every tensor), None, or
            per input ``{"x": {0: "batch", 1: "time"}}``.
        return_outputs: Whether the step also returns the model's output at ``w``.
        portable: True keeps to operators that every target can express (the math form of
            attention, no CPU-only fused kernels); False keeps eager's own kernels.
        stages: Whether the step also returns both gradients and the perturbation of every
            parameter, to see where a difference begins: ``StepResult.stages``. They change what a
            runtime fuses: a verdict is taken without them.
        dynamic_hyper: Numeric options of the base optimizer, besides ``lr``, that are graph inputs
            too: ``{"weight_decay", "momentum"}``. The graph computes with them, 0 or not (a buffer
            of momentum 0 is the gradient). Others are constants, which a session refuses to change.
        staged: Whether there are also the programs ``ascent``, ``descent`` and ``update``: the step
            in three stages, between which gradients can be accumulated or averaged between
            machines (`Session.ascent`).

    Returns:
        The programs ``step``, ``evaluate`` (outputs in eval mode) and ``evaluate_loss``; with
        periodic SAM also ``base_step``, the step of one pass.

    Raises:
        StepConfigError: The batch, the loss or the optimizer do not make a step, or one that has no
            three stages.
        CaptureError: The model branches on values, reads them into Python, or cannot be traced.
    """
    if not step.model.training:
        raise CaptureError(
            f"{type(step.model).__name__} is in eval mode; a training step would have no dropout "
            "and frozen BatchNorm. Call model.train() before capture."
        )
    if staged:
        check_staged(step)
    now = step.hyper(list(dict.fromkeys(["lr", "rho", *dynamic_hyper])))
    hyper = tuple(HyperSpec(name, tuple(values)) for name, values in now.items())
    batch = unwrapped(example_batch)
    layout = step.layout(batch)
    values = [value.cpu() for value in layout.tensors(batch)]
    dims = dims_of(dynamic, layout.names, values)
    multiples = multiples_of(step, layout, values, dims)
    values = at_least_two(values, dims, multiples)
    step.check_master_weights()
    with (
        kernels(portable),
        frozen_draws_refused(),
        TraceableLosses(),  # type: ignore[no-untyped-call]
        older_settings_readable(),
        constants_on_cpu(step),
    ):
        state = state_layout(step, layout, values)
        how = (multiples, return_outputs, portable, stages, hyper)
        return _Capture(step, layout, values, dims, state, *how).run(staged)


class _Capture:
    """One capture: the arguments, in one place, of the three programs."""

    def __init__(
        self,
        step: TrainStep,
        layout: BatchLayout,
        values: list[Tensor],
        dims: list[dict[int, str]],
        state: StateLayout,
        multiples: dict[str, int],
        return_outputs: bool,
        portable: bool,
        stages: bool,
        hyper: tuple[HyperSpec, ...],
    ) -> None:
        self.step = step
        self.layout = layout
        self.values = values
        self.dims = dims
        self.state = state
        self.multiples = multiples
        self.return_outputs = return_outputs
        self.portable = portable
        self.stages = stages
        self.hyper = hyper
        self.drew = False
        self.programs: dict[str, torch.export.ExportedProgram] = {}
        self.specs: list[ProgramSpec] = []
        self.carried: tuple[TensorSpec, ...] = ()

    def run(self, staged: bool) -> CapturedStep:
        batch = tuple(
            TensorSpec(
                name,
                "input" if name in self.layout.inputs else "target",
                dtype_name(name, value),
                tuple(marks.get(d, size) for d, size in enumerate(value.shape)),
            )
            for name, value, marks in zip(self.layout.names, self.values, self.dims, strict=True)
        )
        now = [s for s in self.state.specs if s.role not in ("slot", "memory", "average")]
        averaged = {AVERAGE + name for name in self.step.averages}
        rest = {spec.name for spec in now if AVERAGE + spec.name not in averaged}
        average = [spec for spec in self.state.specs if spec.name in averaged | rest]
        inputs = len(self.layout.inputs)
        of = Evaluations(self.step, self.layout, self.state)
        with eval_mode(self.step.model):
            if averaged:
                self._trace("evaluate_loss_average", average, (), of.loss, len(batch))
                self._trace("evaluate_average", average, (), of.outputs, inputs)
            self._trace("evaluate", now, (), of.outputs, inputs)
            self._trace("evaluate_loss", now, (), of.loss, len(batch))
        periodic = self.step.optimizer.every > 1
        names = ("base_step", "step") if periodic else ("step",)
        for name in names:
            graph = self._trace(name, self.state.specs, self.hyper, self._step(name), len(batch))
        stages = self._trace_stages() if staged else []
        if not self.drew:
            self.state = self.state.without([SEED] if periodic else [SEED, STEP])
        contract = StepContract(
            state=self.state.specs,
            hyper=self.hyper,
            batch=batch,
            batch_kind=self.layout.kind,
            dims=smallest_sizes(
                self.step, self.layout, self.state, self.values, self.dims, self.multiples
            ),
            multiples=self.multiples,
            carried=self.carried,
            programs=(*reversed(self.specs), *stages),
            output_tree=of.output_tree,
            groups=tuple(tuple(group.names) for group in self.step.groups()),
            optimizer=type(self.step.optimizer.base_optimizer).__name__,
            baked=tuple(baked_of(self.step.optimizer, [spec.name for spec in self.hyper])),
            perturbation=name_of(self.step.optimizer.perturbation),
            variant=self.step.optimizer.variant.name,
            every=self.step.optimizer.every,
            ascent_steps=self.step.optimizer.ascent_steps,
            ema=None if self.step.ema is None else repr(self.step.ema),
            autocast=autocast_name(self.step.autocast),
            loss_scaling=self.step.loss_scaling,
        )
        program = contract.program("step")
        named = [spec.name for spec in program.outputs]
        refuse_wrong_flow(graph.graph, program.inputs, named, contract, self.step.semantics)
        return CapturedStep(
            contract=contract,
            semantics=self.step.semantics,
            programs={spec.name: self.programs[spec.name] for spec in contract.programs},
            state={name: value.numpy() for name, value in self.state.values.items()},
            random_ops=tuple(str(node.target) for node in random_nodes(graph.graph)),
            portable=self.portable,
            base_optimizer=BaseOptimizer(
                kind=type(self.step.optimizer.base_optimizer),
                groups=tuple(
                    {key: value for key, value in group.items() if key != "params"}
                    for group in self.step.optimizer.base_optimizer.param_groups
                ),
            ),
        )

    # -- the functions that are traced: flat tensors by name -> (name, role, tensor) --------

    def _step(self, program: str) -> Callable[[Mapping[str, Tensor]], list[Produced]]:
        """The function of a program that trains."""
        perturbed = program == "step"

        def function(given: Mapping[str, Tensor]) -> list[Produced]:
            paths = origins.ModulePaths(self.step.model)
            draws = None
            if SEED in given:
                same = self.step.semantics.randomness == "same"
                draws = Draws(given[SEED], given[STEP], same)
            parameters, buffers = self.state.split(given)
            stages: dict[str, Tensor] | None = {} if self.stages and perturbed else None
            scaler = scaler_of(self.step, given)
            with paths.recording():
                passes, updated, slots = self.step.pure(
                    parameters,
                    buffers,
                    self.state.slots(given),
                    {spec.name: given[HYPER + spec.name] for spec in self.hyper},
                    self.layout,
                    [given[name] for name in self.layout.names],
                    at=paths.at,
                    watch=paths.watch,
                    draws=draws,
                    stages=stages,
                    started=given.get(STARTED),
                    memory=self.state.slots(given, "memory"),
                    perturbed=perturbed,
                    starts_specially=self.state.starts_specially,
                    scaler=scaler,
                )
            result: list[Produced] = [
                (name, "metric", getattr(passes, name)) for name in metrics_of(self.step.semantics)
            ]
            if scaler is not None:
                result.append((SCALED_METRIC, "metric", scaler.shown))
            if self.return_outputs:
                leaves = tree.flatten(passes.outputs)[0]
                result += [(name, "output", leaf) for name, leaf in leaves]
            result += [(STAGE + name, "stage", value) for name, value in (stages or {}).items()]
            after = {**parameters, **updated, **passes.buffers, **self.state.flat(slots)}
            after |= {
                memory_name(name, key): value
                for name, own in passes.memory.items()
                for key, value in own.items()
            }
            return result + new_state(self.step, self.state, given, after, passes.finite, scaler)

        return function

    def _trace_stages(self) -> list[ProgramSpec]:
        """The three stages as programs, and what goes from one to the next."""
        moved = {state for spec in self.specs for state in spec.feeds.values()}
        stages = Stages(self.step, self.layout, self.state, self.hyper, self.return_outputs, moved)
        drawn: list[str] = []
        for name in STAGES:
            graph = self._trace(
                name,
                stages.state(name),
                stages.hyper(name),
                stages.function(name),
                0 if name == "update" else len(self.layout.names),
                stages.carried(name),
                stages.values(stages.carried(name)),
            )
            drawn += [str(node.target) for node in random_nodes(graph.graph)]
        specs = self.specs[-len(STAGES) :]
        del self.specs[-len(STAGES) :]
        stages.check({spec.name: spec for spec in specs}, drawn)
        read = {name for spec in specs for name in spec.inputs}
        self.carried = tuple(spec for spec in stages.all_carried if spec.name in read)
        return specs

    # -- tracing ----------------------------------------------------------------------------------

    def _trace(
        self,
        name: str,
        state: Sequence[TensorSpec],
        hyper: Sequence[HyperSpec],
        function: Callable[[Mapping[str, Tensor]], list[Produced]],
        batch_count: int,
        carried: Sequence[TensorSpec] = (),
        carried_values: Sequence[Tensor] = (),
    ) -> torch.fx.GraphModule:
        names = [spec.name for spec in state] + [HYPER + spec.name for spec in hyper]
        arguments = [self.state.values[spec.name] for spec in state] + [
            torch.tensor(spec.defaults, dtype=torch.float64) for spec in hyper
        ]
        marks: list[dict[int, str]] = [{} for _ in names]
        names += self.layout.names[:batch_count]
        arguments += self.values[:batch_count]
        marks += self.dims[:batch_count]
        names += [spec.name for spec in carried]
        arguments += carried_values
        marks += [{} for _ in carried]
        produced: list[Produced] = []
        # Only what trains goes through the model part by part.
        multiples = self.multiples if name in BY_EXAMPLES else {}

        def flat(*tensors: Tensor) -> list[Tensor]:
            produced[:] = function(dict(zip(names, tensors, strict=True)))
            return [tensor for _, _, tensor in produced]

        graph_module, symbols = traced(flat, arguments, marks, multiples)
        semantics = self.step.semantics
        trains = name in (*TRAINING, "update")
        if name == "step" and (semantics.generator, semantics.randomness) == ("torch", "same"):
            share_draws(graph_module)
        share_dropout_factors(graph_module)
        refuse_mutation(graph_module.graph)
        draws = bool(drawn_nodes(graph_module.graph))
        self.drew |= draws
        # The step counts itself for other programs that draw, too, and for its period.
        unread = set() if draws or (trains and self.drew) else {SEED, STEP}
        if trains and self.step.optimizer.every > 1:
            unread -= {STEP}
        spare = set(names) - set(self.layout.names) if name in STAGES else set()
        kept, unread = drop_unchanged(
            graph_module, names, [name for name, _, _ in produced], unread, spare
        )
        places = [index for index, name in enumerate(names) if name not in unread]
        names = [names[place] for place in places]
        arguments = [arguments[place] for place in places]
        marks = [marks[place] for place in places]
        program = exported(graph_module, arguments, marks, multiples)
        refuse_mutation(program.graph)
        outputs = [
            TensorSpec(output, role, dtype_name(output, tensor), _shape(tensor, symbols))
            for (output, role, tensor), keep in zip(produced, kept, strict=True)
            if keep
        ]
        feeds = {
            spec.name: spec.name[len(NEXT) :] for spec in outputs if spec.name.startswith(NEXT)
        }
        refuse_other_state(self.state.specs, outputs, feeds)
        self.programs[name] = program
        self.specs.append(ProgramSpec(name, tuple(names), tuple(outputs), feeds))
        return graph_module


def _shape(tensor: Tensor, symbols: Mapping[str, str]) -> tuple[int | str, ...]:
    return tuple(
        size if isinstance(size, int) else symbols.get(str(size), str(size))
        for size in tensor.shape
    )
