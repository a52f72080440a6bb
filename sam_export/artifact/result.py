"""What one step reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


class DeviceValue:
    """A value that an engine has computed and that is read when asked for.

    ``float(value)``, ``bool(value)``, ``value.numpy()`` and ``numpy.asarray(value)`` wait for the
    device and copy. ``raw`` is the engine's own object (an ``OrtValue``, a ``torch.Tensor``).
    """

    __slots__ = ("_read", "raw")

    def __init__(self, raw: Any, read: Callable[[Any], NDArray[Any]]) -> None:
        self.raw = raw
        self._read = read

    def is_read_by(self, read: Callable[[Any], NDArray[Any]]) -> bool:
        """Whether it was made by the engine whose ``to_numpy`` this is."""
        return self._read == read

    def numpy(self) -> NDArray[Any]:
        """The value as a NumPy array on the host."""
        return self._read(self.raw)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        del copy  # reading a device value always copies
        return np.asarray(self.numpy(), dtype=dtype)

    def __float__(self) -> float:
        return float(self.numpy())

    def __bool__(self) -> bool:
        return bool(self.numpy())

    def __repr__(self) -> str:
        return repr(self.numpy())


class DeviceValues(Mapping[str, DeviceValue]):
    """Values that an engine has computed, by name; each is read when asked for.

    Args:
        raws: The engine's own objects.
        read: Reads one of them.
    """

    __slots__ = ("_read", "raws")

    def __init__(self, raws: dict[str, Any], read: Callable[[Any], NDArray[Any]]) -> None:
        self.raws = raws
        self._read = read

    def is_read_by(self, read: Callable[[Any], NDArray[Any]]) -> bool:
        """Whether it was made by the engine whose ``to_numpy`` this is."""
        return self._read == read

    def __getitem__(self, name: str) -> DeviceValue:
        return DeviceValue(self.raws[name], self._read)

    def __iter__(self) -> Iterator[str]:
        return iter(self.raws)

    def __len__(self) -> int:
        return len(self.raws)

    def __repr__(self) -> str:
        return f"DeviceValues of {', '.join(self.raws)}"


@dataclass(frozen=True)
class StepResult:
    """Outcome of one SAM step.

    Fields stay on the device and stay valid after later steps; ``float(result.loss)`` reads and
    waits. They are torch tensors from an eager `TrainStep`, `DeviceValue` from a session.

    Attributes:
        loss: Loss of the ascent pass, at ``w``: the one to log. Scalar.
        perturbed_loss: Loss of the descent pass, at ``w + eps_w``. Scalar.
        grad_norm: Global L2 norm of the gradient at ``w``. Scalar.
        perturbation_norm: Global L2 norm of ``eps_w``. Scalar.
        finite: Whether both losses and both gradient norms are finite. Scalar bool.
        outputs: The model's output at ``w`` where the step was captured with
            ``return_outputs=True``, else None.
        stages: Where it was captured with ``stages=True``: ``g.<parameter>``, ``eps.<parameter>``
            and ``g_adv.<parameter>``.
        perturbed_grad_norm: With clipping (`Semantics.clip_norm`, ``clip_value``): global L2 norm
            of ``g_adv`` before it, else None. Scalar.
        loss_scale: With loss scaling: the scale that this step's losses were multiplied by, else
            None. Scalar, float64.
    """

    loss: Any
    perturbed_loss: Any
    grad_norm: Any
    perturbation_norm: Any
    finite: Any
    outputs: Any = None
    stages: Mapping[str, Any] = field(default_factory=dict)
    perturbed_grad_norm: Any = None
    loss_scale: Any = None


@dataclass(frozen=True)
class AscentResult:
    """Outcome of the first stage of a step. Fields stay on the device, as those of `StepResult`.

    Attributes:
        loss: Loss at ``w``: the one to log. Scalar.
        gradients: ``g`` by the name of the trained parameter, of its shape and dtype.
        buffers: What the pass has made of the buffers that a step changes (running statistics), by
            name. The session's own are as they were.
        outputs: The model's output at ``w`` where the step was captured with
            ``return_outputs=True``, else None.
    """

    loss: Any
    gradients: Mapping[str, Any]
    buffers: Mapping[str, Any]
    outputs: Any = None


@dataclass(frozen=True)
class DescentResult:
    """Outcome of the second stage of a step. Fields stay on the device.

    Attributes:
        perturbed_loss: Loss at ``w + eps_w``. Scalar.
        grad_norm: Global L2 norm of the gradient at ``w`` that was given. Scalar.
        perturbation_norm: Global L2 norm of ``eps_w``. Scalar.
        gradients: ``g_adv`` by the name of the trained parameter, of its shape and dtype.
        buffers: The buffers for `Session.update`, by name: those given, unless this pass changes
            them, too (``running_stats="both"``).
    """

    perturbed_loss: Any
    grad_norm: Any
    perturbation_norm: Any
    gradients: Mapping[str, Any]
    buffers: Mapping[str, Any]


@dataclass(frozen=True)
class UpdateResult:
    """Outcome of the last stage of a step. Fields stay on the device.

    Attributes:
        finite: Whether the gradients are finite, and with them the losses and the norms of all
            passes that they come from. Scalar bool.
        perturbed_grad_norm: With clipping: global L2 norm of ``g_adv`` before it, else None.
        loss_scale: With loss scaling: the scale of this step, else None. Scalar, float64.
    """

    finite: Any
    perturbed_grad_norm: Any = None
    loss_scale: Any = None
