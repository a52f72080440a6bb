"""Which tensor of a step is where in a checkpoint of onnxruntime-training, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_export.artifact.contract import HYPER, StepContract
from sam_export.artifact.ort_checkpoint import OptimizerGroup, OrtCheckpoint
from sam_export.errors import ArtifactError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Slots of torch's Adam, in the order of the moments of ``AdamWOptimizer``."""


@dataclass(frozen=True)
class OrtLayout:
    """Where the training state of a step is kept by the stock training API.

    Attributes:
        trained: Parameters with a gradient buffer.
        frozen: The checkpoint's other parameters: constants, hyper-parameters, and state that the
            training model writes itself.
        written: Those of the frozen ones, and with ``update`` ``parameters`` of the trained ones,
            that it writes; they are float32 in the checkpoint, whatever the contract says.
        update: What the training model leaves in the gradient buffers: ``gradient``,
            ``direction``, or, with ``parameters``, zero.
        optimizer: Operator of the optimizer model.
        betas: Of an ``AdamWOptimizer``; empty otherwise.
    """

    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    written: tuple[str, ...]
    update: str
    optimizer: str
    betas: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OrtLayout:
        """The inverse of `to_dict`.

        Raises:
            ArtifactError: A field is missing or of another type.
        """
        try:
            return cls(
                tuple(values["trained"]),
                tuple(values["frozen"]),
                tuple(values["written"]),
                str(values["update"]),
                str(values["optimizer"]),
                tuple(map(float, values["betas"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"The manifest's layout is malformed: {error!r}.") from error

    @property
    def holds_slots(self) -> bool:
        """Whether the slots are the stock optimizer's own moments."""
        return self.update == "gradient" and self.optimizer == "AdamWOptimizer"

    def checkpoint(
        self,
        contract: StepContract,
        state: Mapping[str, NDArray[Any]],
        hyper: Mapping[str, Sequence[float]],
    ) -> OrtCheckpoint:
        """State and hyper-parameters as a checkpoint.

        Raises:
            ArtifactError: The parameters have taken different numbers of steps, and the stock
                optimizer has one number.
        """
        values: dict[str, NDArray[Any]] = {
            **state,
            **{HYPER + name: np.array(numbers, np.float64) for name, numbers in hyper.items()},
        }
        written = set(self.written)
        group = None
        if self.holds_slots:
            steps = {
                float(state[item.name])
                for item in contract.state
                if item.role == "slot" and item.slot == "step"
            }
            if len(steps) != 1:
                raise ArtifactError(
                    f"The parameters have taken different numbers of steps ({sorted(steps)}); the "
                    "stock optimizer has one number. Use target onnx-training or onnx."
                )
            moments = {
                name: tuple(state[f"slot.{key}.{name}"] for key in MOMENTS) for name in self.trained
            }
            group = OptimizerGroup(int(steps.pop()), float(hyper["lr"][0]), moments)
        return OrtCheckpoint(
            {name: values[name] for name in self.trained},
            {
                name: values[name].astype(np.float32) if name in written else values[name]
                for name in self.frozen
            },
            group,
        )

    def known_rounding(self, contract: StepContract) -> dict[str, float]:
        r"""By how much of a step's change the stock optimizer is off, by name; usually empty.

        ``AdamWOptimizer`` keeps its betas, and computes ``1 - beta^t``, in float32; torch takes
        Python's floats for both. So ``1 - beta`` is off by ``a = |float32(beta) - beta| / (1 -
        beta)``, by as much the moments' changes, and ``1 - beta^t``, where most digits cancel, by
        ``b = 2^-24 / (1 - beta^2)`` more at its worst, the second step. A parameter's change has
        the first moment in it and the root of the second: ``2 a_1 + b_1 + a_2 / 2 + b_2 / 2``.
        For the usual betas 1.3e-5 of a moment and 2.2e-5 of a parameter; a test compares with the
        same formula in float32.
        """
        if not self.holds_slots:
            return {}
        a = [abs(float(np.float32(beta)) - beta) / (1.0 - beta) for beta in self.betas]
        b = [2.0**-24 / (1.0 - beta**2) for beta in self.betas]
        by_slot = dict(zip(MOMENTS, a, strict=True))
        found = {
            item.name: by_slot[item.slot]
            for item in contract.state
            if item.slot is not None and item.slot in by_slot
        }
        return found | dict.fromkeys(self.trained, 2 * a[0] + b[0] + a[1] / 2 + b[1] / 2)

    def slots(
        self, contract: StepContract, optimizer: OptimizerGroup | None
    ) -> dict[str, NDArray[Any]]:
        """The slots of the contract from the stock optimizer's state."""
        assert optimizer is not None
        found: dict[str, NDArray[Any]] = {}
        for item in contract.state:
            if item.role == "slot" and item.parameter is not None:
                if item.slot == "step":
                    found[item.name] = np.array(optimizer.step, item.dtype)
                else:
                    moments = optimizer.moments[item.parameter]
                    found[item.name] = np.array(moments[MOMENTS.index(str(item.slot))])
        return found
