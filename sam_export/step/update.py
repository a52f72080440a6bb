"""The base optimizer's own update rule as a pure function of named tensors."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sam_export._compat import optimizers
from sam_export.errors import StepConfigError

Slots = dict[str, dict[str, Tensor]]
"""Parameter name -> slot key -> value."""

# The for-loop form of torch.optim: plain tensor arithmetic, one parameter after the other.
_FOR_LOOP = {"foreach": False, "fused": False, "capturable": False}


_ASKS_FOR_ZERO = {"__bool__": True, "ne": True, "__ne__": True, "gt": True, "__gt__": True,
                  "eq": False, "__eq__": False, "le": False, "__le__": False}  # fmt: skip
"""Comparisons with 0 (``__bool__`` is one), and what they give for an option that is an input."""


class TensorScalars(TorchFunctionMode):
    """Lets numbers of an update be tensors.

    ATen takes ``alpha=`` and ``value=`` as numbers only, so ``p.add_(d, alpha=-lr)`` with a tensor
    ``lr`` would read it into Python and bake its value into the graph. Inside this mode it becomes
    ``p.add_(d * -lr)``, which is the same product: ATen multiplies in the result's dtype too. For
    the same reason ``x.item()`` is ``x`` in float64, as Python's numbers are, and the weight of
    ``lerp`` takes the operand's dtype.

    Args:
        options: Options of the parameter groups that are tensors. ``if weight_decay != 0`` is true
            of them: whatever the number is, the graph computes with it.
    """

    def __init__(self, options: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._options = options

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Rewrites a call that has, or wants, a number."""
        kwargs = kwargs or {}
        name = func.__name__.rstrip("_")
        if func.__name__ in _ASKS_FOR_ZERO and self._is_option_beside_zero(args):
            return _ASKS_FOR_ZERO[func.__name__]
        if name == "item":
            return args[0].double()
        if name == "lerp" and len(args) == 3 and isinstance(args[2], Tensor):
            return func(args[0], args[1], args[2].to(args[0]), **kwargs)
        if isinstance(kwargs.get("alpha"), Tensor) and name in ("add", "sub"):
            alpha = kwargs.pop("alpha")
            other = args[1].to(torch.result_type(args[0], args[1]))  # Muon's is bfloat16
            return func(args[0], other * alpha.to(other), **kwargs)
        if isinstance(kwargs.get("value"), Tensor) and name in ("addcmul", "addcdiv"):
            value = kwargs.pop("value")
            return func(args[0], args[1] * value.to(args[1]), args[2], **kwargs)
        return func(*args, **kwargs)

    def _is_option_beside_zero(self, args: Sequence[Any]) -> bool:
        """Of a comparison with anything else the truth is not known, and it stays a tensor."""
        with_zero = len(args) == 1 or (isinstance(args[1], (int, float)) and args[1] == 0)
        return with_zero and any(args[0] is option for option in self._options)


def rebuilt(
    base: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    groups: Sequence[Sequence[str]],
    slots: Slots,
    overrides: Sequence[Mapping[str, Any]],
    form: Mapping[str, bool] = _FOR_LOOP,
) -> torch.optim.Optimizer:
    """A copy of ``base`` over other tensors: same class, same options, no hooks, its own state.

    Args:
        base: The optimizer to imitate; it is not changed.
        parameters: Tensors by name.
        groups: Names of the parameters of each group.
        slots: State to start from.
        overrides: Options to replace in each group (``{"lr": tensor}``).
        form: Which form of the update it has, where it has several.
    """
    twin = object.__new__(type(base))
    twin.__dict__.update(base.__dict__)
    twin.__dict__.pop("step", None)  # a scheduler binds its own step to the instance
    twin.param_groups = [
        {
            **{key: copy.copy(value) for key, value in group.items() if key != "params"},
            **{key: value for key, value in form.items() if key in group},
            **override,
            "params": [parameters[name] for name in names],
        }
        for group, names, override in zip(base.param_groups, groups, overrides, strict=True)
    ]
    twin.state = defaultdict(dict)
    for name, entries in slots.items():
        twin.state[parameters[name]] = dict(entries)
    return twin


def apply_update(
    base: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    slots: Slots,
    groups: Sequence[Sequence[str]],
    hyper: Sequence[Mapping[str, Tensor]],
    started: Tensor | None = None,
) -> tuple[dict[str, Tensor], Slots]:
    """New parameters and slots after one ``step`` of the base optimizer; pure.

    Args:
        base: Any `torch.optim.Optimizer`: its own ``step`` runs, on copies.
        parameters: Trained parameters by name.
        gradients: Gradients by name; a parameter without one stays as it is.
        slots: Optimizer state by parameter name and slot key.
        groups: Names of the parameters of each group.
        hyper: Tensor-valued options of each group (``lr``), float64 scalars. Where the optimizer
            asks whether one of them is zero, it is taken not to be.
        started: Where the first update is a special one (`Start.is_special`): a scalar, 0 before
            it. Both updates are computed then, and one is selected.
    """
    later = _applied(base, parameters, gradients, slots, groups, hyper)
    if started is None:
        return later
    first = _applied(base, parameters, gradients, {}, groups, hyper)
    is_later = started != 0
    updated = {
        name: torch.where(is_later, later[0][name], first[0][name]) if name in gradients else value
        for name, value in parameters.items()
    }
    chosen = {
        name: {key: torch.where(is_later, value, first[1][name][key]) for key, value in own.items()}
        for name, own in later[1].items()
    }
    return updated, chosen


def _applied(
    base: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    slots: Slots,
    groups: Sequence[Sequence[str]],
    hyper: Sequence[Mapping[str, Tensor]],
) -> tuple[dict[str, Tensor], Slots]:
    copies = {name: value.clone() for name, value in parameters.items()}
    state = {
        name: {key: value.clone() for key, value in entries.items()}
        for name, entries in slots.items()
    }
    branches = isinstance(base, optimizers.BRANCHES_UNLESS_CAPTURABLE)
    form = {**_FOR_LOOP, "capturable": branches}
    twin = rebuilt(base, copies, groups, state, hyper, form)
    options = [_options(group) for group in twin.param_groups]
    for name, gradient in gradients.items():
        copies[name].grad = gradient
    with (
        torch.no_grad(),
        optimizers.as_if_compiling(),
        optimizers.with_tensor_numbers(base),
        TensorScalars([value for own in hyper for value in own.values()]),
    ):
        type(base).step(twin)
    for before, group in zip(options, twin.param_groups, strict=True):
        _refuse_changes(base, before, _options(group))
    return copies, {
        name: _tensors(base, name, twin.state[copies[name]]) for name in slots or gradients
    }


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _refuse_changes(
    base: torch.optim.Optimizer, before: Mapping[str, Any], after: Mapping[str, Any]
) -> None:
    for key, value in after.items():
        if key not in before or (value is not before[key] and value != before[key]):
            raise StepConfigError(
                f"{type(base).__name__} changes {key!r} of its parameter groups at every step; "
                "in a graph that would stay what it was when the step was captured. Only what an "
                "optimizer keeps as tensors in its state can change from step to step."
            )


@dataclass(frozen=True)
class Start:
    """What a base optimizer starts from.

    Attributes:
        slots: Its state, for every trained parameter.
        is_special: Whether the first update is another function than the later ones: no value of
            a slot that the optimizer makes in it would give the same.
    """

    slots: Slots
    is_special: bool = False


def initial_slots(
    base: torch.optim.Optimizer, named: Mapping[str, Tensor], groups: Sequence[Sequence[str]]
) -> Start:
    """The slots that ``base`` starts from, for every parameter in ``groups``.

    State that is there already is taken. Otherwise the optimizer makes its own (some slots do not
    start at zero); a slot that it only makes inside its first ``step`` starts at zero. Whether
    that gives the same first update, bit for bit, a trial step on random gradients has to show;
    where it does not (SGD with dampening), the start is a special one.

    Args:
        base: The base optimizer; it is not changed.
        named: Parameters by name.
        groups: Names of the parameters that get a gradient, per group.

    Raises:
        StepConfigError: A slot is not a tensor.
    """
    present = [name for names in groups for name in names if base.state.get(named[name])]
    if present:
        return Start(_present(base, named, groups))
    generator = torch.Generator().manual_seed(0)
    gradients = {
        name: torch.randn(named[name].shape, generator=generator).to(named[name])
        for names in groups
        for name in names
    }
    made = _after(base, named, groups, gradients, {}, only_init=True)[1]
    stepped, lazy = _after(base, named, groups, gradients, {})
    start: Slots = {}
    for name, entries in lazy.items():
        start[name] = {
            key: made.get(name, {}).get(key, torch.zeros_like(value))
            for key, value in entries.items()
        }
    again, slots = _after(base, named, groups, gradients, start)
    same = all(
        torch.equal(again[name], stepped[name])
        and all(torch.equal(slots[name][key], value) for key, value in lazy[name].items())
        for name in stepped
    )
    return Start(start, is_special=not same)


def _after(
    base: torch.optim.Optimizer,
    named: Mapping[str, Tensor],
    groups: Sequence[Sequence[str]],
    gradients: Mapping[str, Tensor],
    slots: Slots,
    only_init: bool = False,
) -> tuple[dict[str, Tensor], Slots]:
    copies = {name: named[name].detach().clone() for names in groups for name in names}
    start = {
        name: {key: value.clone() for key, value in entries.items()}
        for name, entries in slots.items()
    }
    twin = rebuilt(base, copies, groups, start, [{} for _ in groups])
    for name, copied in copies.items():
        copied.grad = gradients[name].clone()
    if only_init:
        for group in twin.param_groups:
            optimizers.init_group(twin, group)
    else:
        type(base).step(twin)
    return copies, {
        name: _tensors(base, name, twin.state[copied]) for name, copied in copies.items()
    }


def _present(
    base: torch.optim.Optimizer, named: Mapping[str, Tensor], groups: Sequence[Sequence[str]]
) -> Slots:
    slots: Slots = {}
    for names in groups:
        for name in names:
            entries = base.state.get(named[name])
            if not entries:
                raise StepConfigError(
                    f"{type(base).__name__} holds state for some parameters but not for {name!r}. "
                    "Take one step in which every trained parameter has a gradient, or none."
                )
            slots[name] = {
                key: value.detach().clone() for key, value in _tensors(base, name, entries).items()
            }
    return slots


def _tensors(base: torch.optim.Optimizer, name: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """The slots of a parameter as tensors; a number becomes a float64 scalar, None is no slot."""
    found = {}
    for key, value in entries.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[key] = torch.tensor(value, dtype=torch.float64)
        elif isinstance(value, Tensor):
            found[key] = value
        elif value is not None:
            raise StepConfigError(
                f"{type(base).__name__} keeps state[{name!r}][{key!r}] as a "
                f"{type(value).__name__}; only tensors and numbers can be part of a graph's state."
            )
    return found
