"""The contract of a captured step: every graph input and output by name, role, dtype and shape.

It needs no torch. The capture writes it, the artifact stores it, sessions obey it.

Names. Parameters and buffers keep torch's names (``conv1.weight``); a slot is
``slot.<key>.<parameter>`` (``slot.momentum_buffer.conv1.weight``); what a variant of SAM keeps of a
parameter is ``memory.<key>.<parameter>``; an average is ``average.<name>``; a step that draws
random numbers has ``rng.seed`` and ``counter.step``; hyper-parameters are ``hyper.<name>``; the new
value of a state tensor is ``next.<name>``; the model's outputs are ``output``, or ``output.0``,
``output.logits`` where it returns several. Between the stages of a step go
``gradient.<parameter>``, ``perturbed_gradient.<parameter>`` and ``running.<buffer>``; what a pass
makes of the last is ``moved.<buffer>``.
"""

from __future__ import annotations

import functools
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal

from sam_export.artifact.loss_scaling import LossScaling
from sam_export.artifact.semantics import Semantics
from sam_export.errors import ArtifactError

Role = Literal[
    "parameter",
    "buffer",
    "slot",
    "memory",
    "average",
    "counter",
    "rng",
    "scaler",
    "hyper",
    "input",
    "target",
    "metric",
    "output",
    "stage",
    "gradient",
    "running",
    "part",
]

TRAINING = ("step", "base_step")
"""Programs that are a whole step: they have the metrics as outputs, and new state."""

STAGES = ("ascent", "descent", "update")
"""Programs that are a step together: a staged capture has all. Only the last has new state."""

BY_EXAMPLES = (*TRAINING, "ascent", "descent")
"""Programs that run the model as it is in training, on a batch of training."""

GRADIENT = "gradient."
"""Prefix of what ``ascent`` gives: the gradient at ``w`` by a parameter."""

PERTURBED_GRADIENT = "perturbed_gradient."
"""Prefix of what ``descent`` gives: the gradient at ``w + eps_w`` by a parameter."""

RUNNING = "running."
"""Prefix of a buffer on its way from pass to pass of a staged step, until ``update`` stores it."""

MOVED = "moved."
"""Prefix of the output that is such a buffer, as a pass has left it."""

PART = "part"
"""Input of the stages of a step that draws random numbers: which part of its batch this is, int64;
parts draw other numbers."""

AVERAGE = "average."
"""Prefix of state that is the average of a parameter or a buffer."""

STAGE = "stage."
"""Prefix of outputs that are gradients or perturbations, of a step captured with its stages."""

NEXT = "next."
"""Prefix of the output that holds the new value of a state tensor."""

HYPER = "hyper."
"""Prefix of the graph inputs that are hyper-parameters."""

SEED = "rng.seed"
"""State of a step that draws random numbers: the seed, int64, as 64 bits; it never changes."""

STEP = "counter.step"
"""State of a step that draws random numbers, and of periodic SAM: the number of the next step,
int64. It advances by one with every step, skipped ones included; a step that raised is none."""

STARTED = "counter.started"
"""State of a step whose base optimizer (SGD with dampening) or variant (Friendly SAM) treats its
first update specially: 0 before that update, 1 after it, int64. A step that changes nothing does
not change it."""

SCALE = "scaler.scale"
"""State of a step with loss scaling: what the loss is multiplied by, float32."""

GROWTH_TRACKER = "scaler.growth_tracker"
"""State of a step with loss scaling: steps without an overflow since the scale changed, int64. Both
change in a step that is not finite, too: that is how the scale is found."""

METRICS = ("loss", "perturbed_loss", "grad_norm", "perturbation_norm", "finite")
"""The scalar outputs of ``step``, in order; the fields of `StepResult`."""

CLIPPED_METRIC = "perturbed_grad_norm"
"""One more of them, in a step that clips."""

SCALED_METRIC = "loss_scale"
"""One more of them, in a step with loss scaling: its scale, float64."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a graph's signature.

    Attributes:
        name: Name in the graph; unique among the inputs, and among the outputs.
        role: What it is for.
        dtype: NumPy's name of the element type (``float32``, ``int64``, ``bool``).
        shape: One entry per dimension: a size, or the name of a symbolic size (``"batch"``).
        parameter: For a slot or a memory: the parameter it belongs to.
        slot: For a slot: its key in ``optimizer.state[parameter]``; for a memory: that in
            ``SAM.memory[parameter]``.
        eager_dtype: For a slot: its dtype in the eager optimizer where that differs from ``dtype``
            (scalar slots are float64 in the graph).
        trainable: For a parameter: whether the step updates it.
    """

    name: str
    role: Role
    dtype: str
    shape: tuple[int | str, ...]
    parameter: str | None = None
    slot: str | None = None
    eager_dtype: str | None = None
    trainable: bool = False

    @property
    def description(self) -> str:
        """Dtype and shape in one word, as in ``float32[batch, 1, 8, 8]``."""
        return f"{self.dtype}[{', '.join(str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class HyperSpec:
    """One hyper-parameter that is a graph input.

    Attributes:
        name: Keyword of `Session.step` (``lr``); the graph input is ``hyper.lr``, float64[groups].
        defaults: Value at export time, one per parameter group.
    """

    name: str
    defaults: tuple[float, ...]


@dataclass(frozen=True)
class ProgramSpec:
    """One graph over the shared state.

    Attributes:
        name: ``step``, ``evaluate``, ``evaluate_loss``; with periodic SAM also ``base_step``; with
            an average of the weights also ``evaluate_average`` and ``evaluate_loss_average``; of a
            staged capture also ``ascent``, ``descent`` and ``update``.
        inputs: Names of the graph inputs, in order: state, hyper-parameters, batch, and what comes
            from another stage.
        outputs: The graph outputs, in order: metrics, model outputs, what goes to another stage,
            new state.
        feeds: Output name to the name of the state input it replaces.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    feeds: dict[str, str]

    @functools.cached_property
    def reads(self) -> frozenset[str]:
        """``inputs`` to look a name up in, which every step does."""
        return frozenset(self.inputs)


@dataclass(frozen=True)
class StepContract:
    """Names, order, roles, dtypes and shapes of everything that goes in and out of a step.

    Attributes:
        state: Parameters, then buffers, then slots, then memories and averages, then counters and
            seed, in the order of the graph inputs.
        hyper: Hyper-parameters in the order of the graph inputs.
        batch: Inputs and targets in the order in which a batch holds them.
        batch_kind: Whether a batch is a tuple (by position) or a dict (by name).
        dims: Symbolic size to the smallest value it may take.
        multiples: Symbolic size to a number that divides it in programs that train: the batch's, in
            a step with several parts (`Semantics.micro_batches`).
        carried: Of a staged step: what the stages are given besides. Gradients and buffers come
            from another stage.
        programs: The graphs, ``step`` first.
        output_tree: Structure of the model's output (see `artifact.tree`).
        groups: Names of the parameters of each optimizer parameter group.
        optimizer: Name of the base optimizer's class, for people.
        baked: The base optimizer's other options, which are constants of the graphs: per parameter
            group, name to a JSON value. They are those that mean something for the result.
        perturbation: ``sam``, or the name of another one (``ASAM(eta=0.01)``).
        variant: ``sam``, or the name of another one (``GSAM(alpha=0.4)``).
        every: The step whose number (`STEP`) is divisible by it is ``step``, others ``base_step``.
        ascent_steps: How many steps the ascent takes.
        ema: ``EMA(decay=0.999, buffers='average')``, where an average of the weights is kept.
        autocast: The dtype that autocast computes with (``float16``, ``bfloat16``), if any.
        loss_scaling: How the scale of the loss changes, if it is scaled.
    """

    state: tuple[TensorSpec, ...]
    hyper: tuple[HyperSpec, ...]
    batch: tuple[TensorSpec, ...]
    batch_kind: Literal["tuple", "dict"]
    dims: dict[str, int]
    programs: tuple[ProgramSpec, ...]
    output_tree: Any
    groups: tuple[tuple[str, ...], ...]
    optimizer: str
    baked: tuple[dict[str, Any], ...] = ()
    perturbation: str = "sam"
    variant: str = "sam"
    every: int = 1
    ascent_steps: int = 1
    ema: str | None = None
    autocast: str | None = None
    loss_scaling: LossScaling | None = None
    multiples: dict[str, int] = field(default_factory=dict)
    carried: tuple[TensorSpec, ...] = ()

    def program(self, name: str) -> ProgramSpec:
        """The program of that name; `ArtifactError` when there is none."""
        for program in self.programs:
            if program.name == name:
                return program
        raise ArtifactError(
            f"No program {name!r} in this step; it has "
            f"{', '.join(program.name for program in self.programs)}."
        )

    def inputs_of(self, program: ProgramSpec) -> tuple[TensorSpec, ...]:
        """The graph inputs of a program as specs, in order."""
        known = {spec.name: spec for spec in self.inputs}
        return tuple(known[name] for name in program.inputs)

    def fed(self, program: ProgramSpec) -> tuple[TensorSpec, ...]:
        """What a program is given at each run, in order: the batch, and what is carried."""
        given = {spec.name: spec for spec in (*self.batch, *self.carried)}
        return tuple(given[name] for name in program.inputs if name in given)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Everything that is an input of some program."""
        return (*self.state, *self.hyper_inputs, *self.batch, *self.carried)

    @property
    def hyper_inputs(self) -> tuple[TensorSpec, ...]:
        """The hyper-parameters as graph inputs: float64[groups] each."""
        return tuple(
            TensorSpec(HYPER + spec.name, "hyper", "float64", (len(spec.defaults),))
            for spec in self.hyper
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StepContract:
        """The inverse of `to_dict`; an older artifact has nothing of what it does not name.

        Raises:
            ArtifactError: A field is missing, unknown or of another type.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ArtifactError(
                f"The contract in the manifest has {', '.join(unknown)}, which this version of "
                "sam_export does not know; the step may mean something else. Use a newer one."
            )
        off = {f.name: f.default for f in fields(cls) if f.default is not MISSING}
        try:
            values = {**off, "multiples": {}, **values}
            scaling = values["loss_scaling"]
            return cls(
                state=_specs(values["state"]),
                hyper=tuple(
                    HyperSpec(item["name"], tuple(item["defaults"])) for item in values["hyper"]
                ),
                batch=_specs(values["batch"]),
                batch_kind=values["batch_kind"],
                dims=dict(values["dims"]),
                programs=tuple(
                    ProgramSpec(
                        item["name"],
                        tuple(item["inputs"]),
                        _specs(item["outputs"]),
                        dict(item["feeds"]),
                    )
                    for item in values["programs"]
                ),
                output_tree=values["output_tree"],
                groups=tuple(tuple(group) for group in values["groups"]),
                optimizer=values["optimizer"],
                baked=tuple(dict(group) for group in values["baked"]),
                perturbation=values["perturbation"],
                variant=values["variant"],
                every=values["every"],
                ascent_steps=values["ascent_steps"],
                ema=values["ema"],
                autocast=values["autocast"],
                loss_scaling=None if scaling is None else LossScaling(**scaling),
                multiples=dict(values["multiples"]),
                carried=_specs(values["carried"]),
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"The contract in the manifest is malformed: {error!r}.") from error


def metrics_of(semantics: Semantics) -> tuple[str, ...]:
    """The scalar outputs that every step of these semantics has, in order."""
    return (*METRICS, CLIPPED_METRIC) if semantics.clips else METRICS


def discarded_if_not_finite(program: ProgramSpec, semantics: Semantics) -> frozenset[str]:
    """The outputs of ``program`` whose new state is not kept when a step is not finite.

    The step number is kept unless the step raises: the next step draws other random numbers. So is
    the scale of the loss, which an overflow lowers.
    """
    if semantics.on_nonfinite == "ignore":
        return frozenset()
    counts_on = semantics.on_nonfinite == "skip"
    return frozenset(
        output
        for output, state in program.feeds.items()
        if state not in (STEP, SCALE, GROWTH_TRACKER) or not counts_on
    )


def _specs(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(**{**item, "shape": tuple(item["shape"])}) for item in items)
