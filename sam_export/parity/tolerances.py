"""The one table of the numbers that decide a parity verdict, each with where it comes from."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Literal

import numpy as np

Mode = Literal["start", "lock-step", "free-running"]


@dataclass(frozen=True)
class Tolerances:
    """Every number of the verdict.

    Attributes:
        exact: float64: the error allowed relative to the larger of change and floor. Two right
            float64 steps were seen to agree to 1e-10 of the change or better (design, 6.3); ten
            times that, and the figure that the project promises.
        factor: Multiple of the floor that is allowed in every dtype. The floor is the largest of
            five draws of rounding noise and a right target is a sixth draw, so 1 would fail one
            time in six; its sums may be grouped otherwise (blocked, fused, one by one), and the
            errors of two groupings of n terms differ by up to about sqrt(n), here n = 100. Where
            a gradient is nothing but noise, its squares (``exp_avg_sq``) are allowed the square
            of it, which is the same for the gradient.
        narrow: Multiple of the floor that is allowed for the roundings of autocast's casts, beside
            ``factor`` times the floor without them. A right target rounds where eager does, or at
            fewer places (fused operators), and adds up in float32: so its error is one more draw
            from what the floor is the largest of four draws of. Of normal draws the ratio is over 3
            once in 93 times, before it is tried again (``retests``). Not for what is noise: its
            square varies by the square of that, which ``factor`` allows.
        narrow_jitter: By how much weights and inputs are moved for those draws, in units of
            eps(autocast dtype): half, which is what a cast itself does.
        narrow_nudge: What ``nudge`` is with autocast, in units of its eps: a nudge below one
            rounding of the casts would repeat the same draw.
        floors: A change below this many floors is called noise: it is less than ten times what
            two eager runs differ by, so one digit of it at most has a meaning.
        drift: Below float64, free-running: the error allowed relative to the change after all
            steps. Rounding grows there and can tip a decision (ReLU, max pooling); the smallest
            effect of a known fault on the change is 8 % (design, 6.1), this is a quarter of it.
        kernel: Below float64, lock-step: the error allowed relative to the change of one step, in
            units of eps(dtype), and never more than ``drift``: what regrouping a sum of some 1,000
            terms may cost where eager's own kernel happens to be nearly exact. It has to stay below
            56, by which a float32 ``beta`` in Adam's bias correction was seen to be off. Winograd
            convolutions (NNPACK, cuDNN) may lose 60: they are reported as different.
        half_ulp: Rounding of one stored result, in units of eps(dtype) times its size: the floor
            is never taken to be lower, even where the measured noise happens to be 0.
        permutations: Oracle runs with permuted batches, beside two with the batch as it is:
            eager, and eager whose sums round as a plain loop's do, as those of all these runs do
            (`one_by_one`).
        retests: Lock-step: a step that is over its bound is run again this many times from
            slightly moved weights and inputs. A tipped decision is then gone, a fault is not.
        nudge: Size of that move in units of eps(dtype), relative to each element: far more than
            the rounding that tipped the decision (1 to 10), far less than what changes a model.
    """

    exact: float = 1e-9
    factor: float = 10.0
    narrow: float = 3.0
    narrow_jitter: float = 0.5
    narrow_nudge: float = 4.0
    floors: float = 10.0
    drift: float = 0.02
    kernel: float = 16.0
    half_ulp: float = 0.5
    permutations: int = 3
    retests: int = 3
    nudge: float = 64.0

    def relative(self, dtype: str, mode: Mode) -> float:
        """Error allowed relative to the change, in a model of that dtype."""
        if dtype == "float64":
            return self.exact
        if mode == "free-running":
            return self.drift
        return min(self.kernel * float(np.finfo(dtype).eps), self.drift)


def reasons() -> dict[str, str]:
    """Field of `Tolerances` to where its number comes from, out of the docstring."""
    text = inspect.cleandoc(Tolerances.__doc__ or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            name, _, line = line.strip().partition(": ")
        if name:
            found[name] = f"{found.get(name, '')} {line.strip()}".strip()
    return found
