"""How the loss of a float16 step is scaled; see `step.loss_scaling` for what is computed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from sam_export.errors import StepConfigError


@dataclass(frozen=True)
class LossScaling:
    """Dynamic loss scaling, with the fields and defaults of `torch.amp.GradScaler`.

    Attributes:
        init_scale: What the loss of the first step is multiplied by, before it is differentiated.
        growth_factor: The scale is multiplied by it after ``growth_interval`` steps without an
            overflow, as long as the result is finite in float32.
        backoff_factor: The scale is multiplied by it after a step that is not finite.
        growth_interval: Steps without an overflow, one after the other, until the scale grows.

    Raises:
        StepConfigError: A factor that does not grow, or back off; a scale that is no float32
            number above 0; an interval below 1.

    Source: Micikevicius et al., "Mixed Precision Training", 2018,
        https://arxiv.org/abs/1710.03740, section 3.2.
    """

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        for name in ("init_scale", "growth_factor", "backoff_factor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                self._refuse(name, "a number")
        interval = self.growth_interval
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            self._refuse("growth_interval", "a number of steps, at least 1")
        if not 2.0**-149 <= self.init_scale <= 3.4e38:
            self._refuse("init_scale", "a number above 0 that float32 can hold")
        if not (self.growth_factor > 1.0 and math.isfinite(self.growth_factor)):
            self._refuse("growth_factor", "a finite number above 1")
        if not 0.0 < self.backoff_factor < 1.0:
            self._refuse("backoff_factor", "a number between 0 and 1")

    def _refuse(self, name: str, expected: str) -> None:
        found = getattr(self, name)
        raise StepConfigError(f"LossScaling({name}={found!r}): expected {expected}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, for the manifest."""
        return asdict(self)
