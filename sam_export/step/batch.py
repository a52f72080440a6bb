"""How a batch is divided into the model's inputs and the loss's targets."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sam_export.errors import StepConfigError


@dataclass(frozen=True)
class BatchLayout:
    """Names of the tensors of a batch, in its order, and which of them are targets.

    Attributes:
        kind: Whether batches are tuples (by position) or dicts (by name).
        inputs: Names that go to the model's ``forward``.
        targets: Names that go to the loss.
    """

    kind: Literal["tuple", "dict"]
    inputs: tuple[str, ...]
    targets: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Inputs, then targets."""
        return self.inputs + self.targets

    def call(self, model: Any, values: Sequence[Tensor]) -> Any:
        """The model's output on a batch given in the order of `names`."""
        inputs = values[: len(self.inputs)]
        if self.kind == "dict":
            return model(**dict(zip(self.inputs, inputs, strict=True)))
        return model(*inputs)

    def tensors(self, batch: Sequence[Any] | Mapping[str, Any]) -> list[Tensor]:
        """The tensors of ``batch`` in the order of `names`.

        Raises:
            StepConfigError: Another number of entries, other names, or an entry that is no tensor.
        """
        batch = unwrapped(batch)
        if isinstance(batch, Mapping) != (self.kind == "dict"):
            raise StepConfigError(
                f"The batch is a {type(batch).__name__}; this step takes a {self.kind} of "
                f"{', '.join(self.names)}."
            )
        if isinstance(batch, Mapping):
            if set(batch) != set(self.names):
                raise StepConfigError(
                    f"The batch has {', '.join(map(str, batch))}; expected {', '.join(self.names)}."
                )
            values = [batch[name] for name in self.names]
        else:
            if len(batch) != len(self.names):
                raise StepConfigError(
                    f"The batch has {len(batch)} tensors; expected {len(self.names)}: "
                    f"{', '.join(self.names)}."
                )
            values = list(batch)
        for name, value in zip(self.names, values, strict=True):
            if not isinstance(value, Tensor):
                raise StepConfigError(
                    f"Batch entry {name!r} is a {type(value).__name__}; expected a torch.Tensor."
                )
            if value.numel() == 0:
                raise StepConfigError(
                    f"Batch entry {name!r} is empty (shape {list(value.shape)}); "
                    "a step needs at least one example."
                )
        return values


def unwrapped(batch: Any) -> Any:
    """``step(batch)`` and ``step(*batch)`` mean the same for a batch that is a dict."""
    if isinstance(batch, (tuple, list)) and len(batch) == 1 and isinstance(batch[0], Mapping):
        return batch[0]
    return batch


def layout_of(
    model: torch.nn.Module, loss_fn: Any, num_targets: int, batch: Sequence[Any] | Mapping[str, Any]
) -> BatchLayout:
    """The layout of batches like ``batch``.

    A tuple: the last ``num_targets`` entries are targets, the others are named after the
    parameters of the model's ``forward``. A dict: keys that ``forward`` takes are inputs, the
    others are targets, in the dict's order. Without a loss function everything is an input.

    Raises:
        StepConfigError: Too few entries, or not ``num_targets`` targets.
    """
    batch = unwrapped(batch)
    wanted = 0 if loss_fn is None else num_targets
    signature = inspect.signature(model.forward)
    named = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind
        in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    takes_any = any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD
        for parameter in signature.parameters.values()
    )
    if isinstance(batch, Mapping):
        keys = [str(key) for key in batch]
        if takes_any:
            inputs = keys[: len(keys) - wanted]
        else:
            accepted = set(signature.parameters)
            inputs = [key for key in keys if key in accepted]
        targets = [key for key in keys if key not in inputs]
        if len(targets) != wanted or not inputs:
            raise StepConfigError(
                f"The batch has {', '.join(keys)}; {type(model).__name__}.forward takes "
                f"{', '.join(signature.parameters)}, which leaves {len(targets)} targets where "
                f"num_targets={wanted}. Name the inputs after forward's parameters."
            )
        return BatchLayout("dict", tuple(inputs), tuple(targets))
    if not isinstance(batch, (tuple, list)):
        raise StepConfigError(
            f"A batch is a tuple or a dict of tensors; found a {type(batch).__name__}."
        )
    count = len(batch) - wanted
    if count < 1:
        raise StepConfigError(
            f"The batch has {len(batch)} tensors, of which num_targets={wanted} are targets: "
            "nothing is left for the model. Pass (inputs..., targets...)."
        )
    inputs = [named[i] if i < len(named) else f"input{i}" for i in range(count)]
    targets = ["target"] if wanted == 1 else [f"target{i}" for i in range(wanted)]
    if set(targets) & set(inputs):
        targets = [f"loss_{name}" for name in targets]
    return BatchLayout("tuple", tuple(inputs), tuple(targets))
