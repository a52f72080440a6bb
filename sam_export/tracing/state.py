"""The training state of a step as an ordered list of named tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sam_export.artifact.contract import (
    AVERAGE,
    GROWTH_TRACKER,
    SCALE,
    SEED,
    STARTED,
    STEP,
    Role,
    TensorSpec,
)
from sam_export.errors import CaptureError, SamExportError, StepConfigError
from sam_export.step.batch import BatchLayout
from sam_export.step.train_step import TrainStep
from sam_export.step.update import Slots, initial_slots

# NumPy and safetensors have names for these; state is never bfloat16.
_DTYPES = {
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


def dtype_name(name: str, tensor: Tensor) -> str:
    """NumPy's name of a tensor's dtype.

    Raises:
        CaptureError: NumPy has none (bfloat16, complex).
    """
    if tensor.dtype not in _DTYPES:
        raise CaptureError(
            f"{name!r} is {tensor.dtype}, which the state and the batch of an artifact cannot "
            f"hold; supported are {', '.join(_DTYPES.values())}. Keep the weights in float32."
        )
    return _DTYPES[tensor.dtype]


@dataclass(frozen=True)
class StateLayout:
    """Parameters, then buffers, then slots, then counters, the scale of the loss and the seed.

    Attributes:
        specs: One per state tensor, in the order of the graph inputs.
        values: Initial value by name, on the CPU, in the dtype of the spec.
        trained: Names of the parameters that the loss depends on and the optimizer trains.
        starts_specially: Whether the base optimizer's first update is a special one.
    """

    specs: tuple[TensorSpec, ...]
    values: dict[str, Tensor]
    trained: tuple[str, ...]
    starts_specially: bool = False

    def split(self, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and buffers out of all state."""
        return (
            {s.name: given[s.name] for s in self.specs if s.role == "parameter"},
            {s.name: given[s.name] for s in self.specs if s.role == "buffer"},
        )

    def without(self, names: Collection[str]) -> StateLayout:
        """The layout of a step that has no use for some of the state."""
        specs = tuple(spec for spec in self.specs if spec.name not in names)
        return replace(
            self, specs=specs, values={spec.name: self.values[spec.name] for spec in specs}
        )

    def slots(self, given: Mapping[str, Tensor], role: Role = "slot") -> Slots:
        """Slots (or memories) out of all state, by parameter name and key."""
        slots: Slots = {}
        for spec in self.specs:
            if spec.role == role:
                assert spec.parameter is not None
                assert spec.slot is not None
                slots.setdefault(spec.parameter, {})[spec.slot] = given[spec.name]
        return slots

    def averages(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Averages out of all state, by the name of what is averaged."""
        names = [spec.name for spec in self.specs if spec.role == "average"]
        return {name.removeprefix(AVERAGE): given[name] for name in names}

    def flat(self, slots: Slots) -> dict[str, Tensor]:
        """The inverse of `slots`.

        Raises:
            CaptureError: The update made or dropped a slot.
        """
        flat = {
            slot_name(parameter, key): value
            for parameter, entries in slots.items()
            for key, value in entries.items()
        }
        expected = {spec.name for spec in self.specs if spec.role == "slot"}
        if set(flat) != expected:
            raise CaptureError(
                "The base optimizer changes its set of slots during a step: "
                f"{', '.join(sorted(set(flat) ^ expected))}."
            )
        return flat


def slot_name(parameter: str, key: str) -> str:
    """Name of a slot in the contract."""
    return f"slot.{key}.{parameter}"


def memory_name(parameter: str, key: str) -> str:
    """Name of a variant's memory in the contract."""
    return f"memory.{key}.{parameter}"


def state_layout(step: TrainStep, layout: BatchLayout, values: Sequence[Tensor]) -> StateLayout:
    """The state of ``step``: every parameter and buffer of the model, every slot of the optimizer,
    what the SAM variant keeps, averages, where the first update is a special one, whether that was,
    the scale of the loss, where random numbers come from Philox, the seed, and there and in
    periodic SAM the step number.

    Raises:
        StepConfigError: The loss uses no trained parameter, or the optimizer's slots cannot be
            part of a graph.
        CaptureError: The forward pass cannot be traced, or names clash.
    """
    named: dict[str, Tensor] = dict(step.model.named_parameters())
    buffers = dict(step.model.named_buffers())
    used = _used(step, layout, values)
    groups = [[name for name in names if name in used] for names in step.group_names()]
    trained = tuple(name for names in groups for name in names)
    if not trained:
        raise StepConfigError(
            "The loss depends on no trained parameter; there is nothing to train."
        )
    specs: list[TensorSpec] = []
    state: dict[str, Tensor] = {}

    def add(spec: TensorSpec, value: Tensor) -> None:
        if spec.name in state or spec.name in layout.names:
            raise CaptureError(
                f"Two tensors of the step are called {spec.name!r}. Rename the parameter or the "
                "argument of forward."
            )
        specs.append(spec)
        state[spec.name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)

    for name, value in named.items():
        shape = tuple(value.shape)
        dtype = dtype_name(name, value)
        add(TensorSpec(name, "parameter", dtype, shape, trainable=name in trained), value)
    for name, value in buffers.items():
        add(TensorSpec(name, "buffer", dtype_name(name, value), tuple(value.shape)), value)

    start = initial_slots(step.optimizer.base_optimizer, named, groups)
    slots = start.slots
    scalar = {"step"} | {
        key
        for name, entries in slots.items()
        for key, value in entries.items()
        if value.dim() == 0 and named[name].dim() > 0
    }
    for name in trained:
        for key, value in slots.get(name, {}).items():
            eager = dtype_name(slot_name(name, key), value)
            if key in scalar and value.is_floating_point():
                value = value.double()
            dtype = dtype_name(name, value)
            spec = TensorSpec(
                slot_name(name, key),
                "slot",
                dtype,
                tuple(value.shape),
                parameter=name,
                slot=key,
                eager_dtype=eager if eager != dtype else None,
            )
            add(spec, value)
    kept = step.memory()
    for name in trained:
        for key, value in kept.get(name, {}).items():
            memory, dtype = memory_name(name, key), dtype_name(name, value)
            spec = TensorSpec(memory, "memory", dtype, tuple(value.shape), parameter=name, slot=key)
            add(spec, value)
    for name, value in step.averages.items():
        average = AVERAGE + name
        add(TensorSpec(average, "average", dtype_name(average, value), tuple(value.shape)), value)
    if start.is_special or step.optimizer.variant.starts:
        has_started = not start.is_special and bool(step.optimizer.memory)
        add(TensorSpec(STARTED, "counter", "int64", ()), torch.tensor(int(has_started)))
    scaler = step.scaler(torch.device("cpu"))
    if scaler is not None:
        add(TensorSpec(SCALE, "scaler", "float32", ()), scaler.scale)
        add(TensorSpec(GROWTH_TRACKER, "scaler", "int64", ()), scaler.growth_tracker)
    if step.semantics.generator == "philox":
        add(TensorSpec(SEED, "rng", "int64", ()), torch.tensor(step.seed))
    if step.semantics.generator == "philox" or step.optimizer.every > 1:
        add(TensorSpec(STEP, "counter", "int64", ()), torch.tensor(step.step_count))
    return StateLayout(tuple(specs), state, trained, start.is_special)


def _used(step: TrainStep, layout: BatchLayout, values: Sequence[Tensor]) -> set[str]:
    """Names of the trained parameters that the loss depends on, by one pass on fake tensors."""
    from sam_export.tracing.trace import explained

    names = [name for group in step.group_names() for name in group]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        try:
            parameters = {
                name: mode.from_tensor(p.detach()).cpu()
                for name, p in step.model.named_parameters()
            }
            buffers = {name: mode.from_tensor(b).cpu() for name, b in step.model.named_buffers()}
            batch = [mode.from_tensor(value) for value in values]
            with torch.enable_grad():
                for name in names:
                    parameters[name].requires_grad_()
                gradients = step.objective(layout, batch)(
                    parameters,
                    buffers,
                    lambda loss, _: torch.autograd.grad(
                        loss, [parameters[name] for name in names], allow_unused=True
                    ),
                )
        except SamExportError:
            raise
        except Exception as error:
            raise explained(error) from error
    return {name for name, g in zip(names, gradients, strict=True) if g is not None}
