"""An eager model and optimizer beside a contract: which tensor is which."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sam_export.artifact.contract import StepContract, TensorSpec
from sam_export.artifact.state_file import differences, first_few
from sam_export.errors import SessionError

if TYPE_CHECKING:
    import torch


def host_array(value: Any) -> NDArray[Any]:
    """A copy on the host of a torch tensor (or of a Python number)."""
    return np.array(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


def parts_of(model: Any, optimizer: Any) -> tuple[Any, Any, Any]:
    """Model, optimizer and, where ``model`` is a `TrainStep`, that step; else None.

    Raises:
        SessionError: A model comes without its optimizer, or a step with one.
    """
    is_step = all(hasattr(model, name) for name in ("model", "optimizer", "step_count", "seed"))
    if is_step != (optimizer is None):
        raise SessionError(
            "A model comes with its optimizer, and a TrainStep alone: give (model, optimizer), or "
            "(step)."
        )
    return (model.model, model.optimizer, model) if is_step else (model, optimizer, None)


def refuse_other_step(contract: StepContract, step: Any) -> None:
    """Refuses a `TrainStep` that scales its loss or averages its weights in another way.

    Raises:
        SessionError: Their settings differ.
    """
    found = getattr(step, "loss_scaling", None)
    if step is not None and found != contract.loss_scaling:
        raise SessionError(
            f"The TrainStep has loss_scaling={found}, and this step {contract.loss_scaling}: the "
            "scale of one means nothing to the other. Nothing changed. To leave the scale out, "
            "give its model and optimizer instead."
        )
    ema = None if getattr(step, "ema", None) is None else repr(step.ema)
    if step is not None and ema != contract.ema:
        raise SessionError(
            f"The TrainStep has ema={ema}, and this step {contract.ema}. Nothing changed. To leave "
            "the average out, give its model and optimizer instead."
        )


class EagerState:
    """An eager model and optimizer, matched by name with a contract.

    Attributes:
        base: The base optimizer.
        tensors: Parameters and buffers by name.
        slots: Each slot with its parameter and its eager value; None where it is not made yet.
        memories: The same of what the SAM variant keeps; none without its `SAM`.
        settings: Name of a hyper-parameter, index of a group that has it, the group, and under
            which key.

    Raises:
        SessionError: They do not belong to the contract's step; names the first differences.
    """

    def __init__(self, contract: StepContract, model: torch.nn.Module, optimizer: Any) -> None:
        self.base: torch.optim.Optimizer = getattr(optimizer, "base_optimizer", optimizer)
        self.tensors = self._match_model(contract, model)
        self._check_groups(contract)
        self.slots = self._match_slots(contract)
        self.sam: Any = optimizer if optimizer is not self.base else None
        memory = {} if self.sam is None else self.sam.memory
        self.memories = [
            (spec, p, memory.get(p, {}).get(spec.slot))
            for spec in contract.state
            if spec.role == "memory" and self.sam is not None
            for p in [self.tensors[str(spec.parameter)]]
        ]
        # A base optimizer with a rho of its own (Adadelta) holds the radius under another name.
        unnamed = "sam_rho" if "rho" in self.base.defaults else "rho"
        radius = getattr(optimizer, "radius_key", unnamed)
        renamed = {"rho": radius, "base_rho": "rho"}
        keys = {spec.name: renamed.get(spec.name, spec.name) for spec in contract.hyper}
        self.settings = [
            (name, index, group, key)
            for name, key in keys.items()
            for index, group in enumerate(self.base.param_groups)
            if key in group or name != "rho"  # without its SAM, the base has no radius
        ]
        self._refuse(self._changed(contract) + self._other_kind(contract))
        absent = {name for name, _, group, key in self.settings if key not in group}
        self._refuse([f"a parameter group has no {name!r}" for name in sorted(absent)])

    def new_slot(self, spec: TensorSpec, parameter: torch.Tensor) -> torch.Tensor:
        """An empty slot, where and as the optimizer would make it."""
        import torch

        dtype = getattr(torch, spec.eager_dtype or spec.dtype)
        if spec.shape == parameter.shape and spec.slot != "step":
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        groups = self.base.param_groups
        (group,) = (g for g in groups if any(p is parameter for p in g["params"]))
        # torch.optim keeps the step count on the host unless the update must run without it.
        on_host = spec.slot == "step" and not (group.get("capturable") or group.get("fused"))
        device = "cpu" if on_host else parameter.device
        return torch.empty([int(size) for size in spec.shape], dtype=dtype, device=device)

    def _match_model(
        self, contract: StepContract, model: torch.nn.Module
    ) -> dict[str, torch.Tensor]:
        found: dict[str, dict[str, torch.Tensor]] = {
            "parameter": dict(model.named_parameters(remove_duplicate=False)),
            "buffer": dict(model.named_buffers(remove_duplicate=False)),
        }
        specs = [spec for spec in contract.state if spec.role in found]
        tensors = {s.name: found[s.role][s.name] for s in specs if s.name in found[s.role]}
        covered = {id(tensor) for tensor in tensors.values()}
        shapes = {
            name: _shape(tensor)
            for part in found.values()
            for name, tensor in part.items()
            if name in tensors or id(tensor) not in covered  # a tied one goes by its first name
        }
        self._refuse(differences(shapes, specs), model)
        return tensors

    def _check_groups(self, contract: StepContract) -> None:
        if type(self.base).__name__ != contract.optimizer:
            self._refuse([f"the step was made with {contract.optimizer}"])
        names = {id(self.tensors[name]): name for group in contract.groups for name in group}
        found = [
            {names[id(p)] for p in group["params"] if id(p) in names}
            for group in self.base.param_groups
        ]
        if found != [set(group) for group in contract.groups]:
            sizes, wanted = list(map(len, found)), list(map(len, contract.groups))
            line = f"its groups hold {sizes} of the trained parameters, the step's {wanted}"
            self._refuse([f"{line}, each its own ones; make it from this model, in these groups"])

    def _changed(self, contract: StepContract) -> list[str]:
        """Options that are constants of the graphs, and others here."""
        lines = []
        groups = self.base.param_groups
        for index, (baked, group) in enumerate(zip(contract.baked, groups, strict=False)):
            for name, value in baked.items():
                found = group.get(name, value)
                if hasattr(found, "tolist"):
                    found = found.tolist()
                found = list(found) if isinstance(found, tuple) else found
                if found != value and isinstance(value, (bool, int, float, list)):
                    lines.append(
                        f"{name} of group {index} is {found!r} and in the graph {value!r}, a "
                        f"constant unless captured with dynamic_hyper=[{name!r}]"
                    )
        return lines

    def _other_kind(self, contract: StepContract) -> list[str]:
        """What of the `SAM` is a constant of the graphs, and another here."""
        if self.sam is None:
            return []
        found = {
            "every": self.sam.every,
            "ascent_steps": self.sam.ascent_steps,
            "variant": self.sam.variant.name,
        }
        return [
            f"{name} is {value!r} and in the graph {getattr(contract, name)!r}"
            for name, value in found.items()
            if value != getattr(contract, name)
        ]

    def _match_slots(self, contract: StepContract) -> list[tuple[TensorSpec, torch.Tensor, Any]]:
        held = {
            (spec.name, key): value
            for spec in contract.state
            if spec.trainable
            for key, value in self.base.state.get(self.tensors[spec.name], {}).items()
            if value is not None
        }
        slots = []
        specs, shapes = [], {}
        for spec in contract.state:
            if spec.role != "slot":
                continue
            parameter = str(spec.parameter)
            value = held.pop((parameter, str(spec.slot)), None)
            slots.append((spec, self.tensors[parameter], value))
            if value is not None:
                specs.append(replace(spec, dtype=spec.eager_dtype or spec.dtype))
                number = (specs[-1].dtype, ())
                shapes[spec.name] = _shape(value) if hasattr(value, "dtype") else number
        unknown = [f"slot.{key}.{name}: not a tensor of this step" for name, key in held]
        self._refuse(differences(shapes, specs) + unknown)
        return slots

    def _refuse(self, lines: list[str], culprit: Any = None) -> None:
        if lines:
            name = type(self.base if culprit is None else culprit).__name__
            found = first_few(lines)
            raise SessionError(f"{name} does not belong to this step: {found}. Nothing changed.")


def _shape(tensor: Any) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
