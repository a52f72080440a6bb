"""Learning-rate schedules: the factor on the learning rate, by how many epochs are done."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sam_export.cli.errors import CommandError

FORMS = "constant, cosine or step:EPOCHS:FACTOR"


@dataclass(frozen=True)
class LrSchedule:
    """A factor on the learning rate that changes over a run.

    Attributes:
        text: As it was given.
        factor: The factor, from the epochs done (a fraction within an epoch) and the epochs of the
            whole run.
        within_epoch: Whether it changes within an epoch; then its length must be known.
    """

    text: str
    factor: Callable[[float, int], float]
    within_epoch: bool


def parse_schedule(text: str) -> LrSchedule:
    """The schedule of that text.

    - ``constant``: 1.
    - ``cosine``: ``(1 + cos(pi * done / epochs)) / 2``, from 1 down to 0. Loshchilov, Hutter,
      "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017,
      https://arxiv.org/abs/1608.03983, equation 5 without restarts.
    - ``step:EPOCHS:FACTOR``: ``FACTOR ** floor(done / EPOCHS)``.

    Raises:
        CommandError: Another text.
    """
    kind, *values = text.split(":")
    if kind == "constant" and not values:
        return LrSchedule(text, lambda *_: 1.0, within_epoch=False)
    if kind == "cosine" and not values:
        return LrSchedule(text, _cosine, within_epoch=True)
    if kind == "step" and len(values) == 2:
        try:
            every, factor = int(values[0]), float(values[1])
        except ValueError:
            every, factor = 0, math.nan
        if every >= 1 and 0 < factor < math.inf:
            return LrSchedule(
                text, lambda done, _: factor ** (int(done) // every), within_epoch=False
            )
    raise CommandError(
        f"--lr-schedule {text!r}: expected {FORMS}, as in step:30:0.1 (times 0.1 every 30 epochs)."
    )


def _cosine(done: float, epochs: int) -> float:
    return (1 + math.cos(math.pi * done / epochs)) / 2
