"""Mixed precision: in which dtype the model and the loss of a step compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from sam_export.artifact.loss_scaling import LossScaling
from sam_export.artifact.semantics import Semantics
from sam_export.errors import StepConfigError

NARROW = (torch.float16, torch.bfloat16)
"""What `torch.autocast` can cast to."""


def autocast_name(dtype: torch.dtype | None) -> str | None:
    """NumPy's name of an autocast dtype, for the contract."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def autocasting(model: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """`torch.autocast` to ``dtype`` on the device of the model's first parameter; None: nothing."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype)


def widened(values: Any) -> Any:
    """Tensors of any structure, with float16 and bfloat16 turned into float32.

    So the results of a step have the same dtypes with and without autocast. NumPy has no bfloat16.
    """

    def wide(value: Tensor) -> Tensor:
        return value.float() if value.dtype in NARROW else value

    return torch.utils._pytree.tree_map_only(Tensor, wide, values)


def check_precision(
    autocast: torch.dtype | None, loss_scaling: LossScaling | None, semantics: Semantics
) -> None:
    """Refuses settings that have no meaning together.

    Raises:
        StepConfigError: Another dtype than float16 and bfloat16, or loss scaling in a step that
            does not skip what is not finite.
    """
    if autocast is not None and autocast not in NARROW:
        raise StepConfigError(
            f"autocast={autocast!r}: expected torch.float16, torch.bfloat16 or None."
        )
    if loss_scaling is not None and not isinstance(loss_scaling, LossScaling):
        raise StepConfigError(
            f"loss_scaling={loss_scaling!r}: expected sam_export.LossScaling(...) or None."
        )
    if loss_scaling is not None and semantics.on_nonfinite != "skip":
        raise StepConfigError(
            f"Loss scaling finds its scale by overflows, and a step that overflows is skipped: it "
            f"needs Semantics(on_nonfinite='skip'), not {semantics.on_nonfinite!r}."
        )


def check_master_weights(
    named: Iterable[tuple[str, Tensor]],
    autocast: torch.dtype | None,
    loss_scaling: LossScaling | None,
) -> None:
    """Refuses weights that autocast would not cast, or that could not hold a scaled update.

    Raises:
        StepConfigError: A floating-point parameter is not float32.
    """
    if autocast is None and loss_scaling is None:
        return
    for name, value in named:
        if value.is_floating_point() and value.dtype != torch.float32:
            what = f"autocast={autocast}" if autocast is not None else "loss scaling"
            raise StepConfigError(
                f"Parameter {name!r} is {str(value.dtype).removeprefix('torch.')}. With {what} the "
                "weights stay float32 (master weights): autocast casts what it computes with, and "
                "leaves float64 as it is. Call model.float()."
            )
