"""From random words to distributions, by operations that every runtime rounds alike.

Only ``+ - * /``, ``floor``, comparisons and selections in float64, and integer arithmetic: IEEE 754
fixes their results to the last bit. A library's ``log``, ``cos`` and even ``sqrt`` differ from
runtime to runtime, so they are written out here. A float32 draw is the float64 draw rounded,
or cut off, so models of different dtypes see the same noise and the same masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Words = Callable[[Sequence[int], int], Tensor]
"""(size, part) -> int32 words; part 0 leads, part 1 gives 32 bits more."""

Mask = Callable[[Sequence[int], int], Tensor]
"""(size, threshold) -> bool, true with probability ``threshold / 2^32 + 1/2``."""

_TWO_32 = 2.0**32

_EXTREME = 2.0**-6

_MANTISSA = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}

# atanh(t) / t in powers of t^2; |t| <= 3 - 2 sqrt(2), so the first term left out is below 1e-18.
_ATANH = [1.0 / (2 * k + 1) for k in range(12)]
# Taylor series on |x| <= pi/4; the first terms left out are below 1e-17.
_COS = [(-1) ** k / math.factorial(2 * k) for k in range(9)]
_SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in range(9)]


def bernoulli(words: Words, mask: Mask, size: Sequence[int], probability: float) -> Tensor:
    """True with a probability that is rounded to a multiple of 2^-32.

    From a word each where the probability is within `_EXTREME` of 0 or 1: there, two decisions of a
    mask are correlated by up to 2^-8; elsewhere by less than 2^-12.

    Args:
        words: Where the bits come from.
        mask: Makes decisions from fewer bits.
        size: Shape of the result.
        probability: 0 to 1.

    Returns:
        bool of shape ``size``.
    """
    threshold = round(probability * 2**32) - 2**31
    if _EXTREME <= probability <= 1 - _EXTREME:
        return mask(size, threshold)
    leading = words(size, 0)
    if threshold >= 2**31:
        return torch.ones_like(leading, dtype=torch.bool)
    return leading < threshold


def bernoulli_of(words: Words, probability: Tensor) -> Tensor:
    """True with a probability per element; bool of the shape of ``probability``."""
    return _leading(words, probability.shape) < probability.double() * _TWO_32


def uniform(words: Words, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Multiples of 2^-b in [0, 1), with b = 53, 24, 11 or 8 as the mantissa of ``dtype`` has it.

    A narrower dtype gets the leading bits of the wider one's draw.
    """
    leading = _leading(words, size)
    if dtype == torch.float64:
        trailing = torch.floor((words(size, 1).double() + 2.0**31) * 2.0**-11)
        return (leading * 2.0**21 + trailing) * 2.0**-53
    bits = _MANTISSA[dtype]
    return (torch.floor(leading * 2.0 ** (bits - 32)) * 2.0**-bits).to(dtype)


def uniform_between(
    words: Words, size: Sequence[int], dtype: torch.dtype, low: float, high: float
) -> Tensor:
    """``low + (high - low) u`` with `uniform` ``u``, in float64, rounded to ``dtype``.

    Where rounding reaches ``high`` itself, the value is ``low``.
    """
    unit = uniform(words, size, dtype)
    if (low, high) == (0.0, 1.0):
        return unit
    values = (unit.double() * (high - low) + low).to(dtype)
    return torch.where(values < high, values, low) if high > low else values


def normal(words: Words, size: Sequence[int]) -> Tensor:
    """Standard normal, float64; a narrower draw is this one rounded.

    ``sqrt(-2 ln u) cos(2 pi v)``, with ``u = (k + 1/2) / 2^32`` and ``v = m / 2^32`` for two
    words ``k`` and ``m``.

    Source: G. E. P. Box, M. E. Muller, "A note on the generation of random normal deviates", 1958,
        https://doi.org/10.1214/aoms/1177706645
    """
    radius = _sqrt(exponential(words, size) * 2.0)
    turn = (words(size, 1).double() + 2.0**31) * 2.0**-32
    return radius * _cos_of_turn(turn)


def exponential(words: Words, size: Sequence[int]) -> Tensor:
    """Exponential of rate 1, float64, never 0: ``-ln((k + 1/2) / 2^32)`` for a word ``k``."""
    return -_log((_leading(words, size) + 0.5) * 2.0**-32)


def integers(words: Words, size: Sequence[int], low: int, high: int) -> Tensor:
    """Integers in [low, high), int64: 63 bits modulo ``high - low``.

    The chances of two values differ by at most ``(high - low) / 2^63`` of themselves.
    """
    return torch.remainder(_bits_63(words, size), high - low) + low


def permutation(words: Words, count: int) -> Tensor:
    """A permutation of 0 to ``count - 1``, int64: the order of as many 63-bit numbers."""
    order: Tensor = torch.sort(_bits_63(words, (count,)), stable=True).indices
    return order


def _leading(words: Words, size: Sequence[int]) -> Tensor:
    """The first word as a whole number from 0 to 2^32 - 1, in float64."""
    return words(size, 0).double() + 2.0**31


def _bits_63(words: Words, size: Sequence[int]) -> Tensor:
    leading = words(size, 0).long() + 2**31
    trailing = words(size, 1).long() + 2**31
    return leading * 2**31 + torch.div(trailing, 2, rounding_mode="floor")


def _log(x: Tensor) -> Tensor:
    """``ln x`` for 2^-34 <= x <= 1: ``ln x = e ln 2 + 2 atanh((m - 1) / (m + 1))``, x = m 2^e."""
    half = math.sqrt(0.5)
    eights, ones = (
        [half * 2.0 ** (-8 * j) for j in range(1, 5)],
        [half * 2.0**-i for i in range(8)],
    )
    coarse = _count(x, eights)
    x = x * _power(x, eights, 2.0**8)
    fine = _count(x, ones)
    x = x * _power(x, ones, 2.0)
    t = (x - 1.0) / (x + 1.0)
    return (coarse * 8.0 + fine) * -math.log(2.0) + t * 2.0 * _polynomial(_ATANH, t * t)


def _sqrt(x: Tensor) -> Tensor:
    """``sqrt x`` for 2^-56 < x < 64, by Heron's rule: ``s <- (s + m / s) / 2``, x = m 4^e.

    ONNX Runtime's own is off by a rounding in some elements.
    """
    reduced = x * 2.0**-6
    eights, ones = [4.0 ** (-8 * j) for j in range(1, 4)], [4.0**-i for i in range(1, 8)]
    raised = reduced * _power(reduced, eights, 4.0**8)
    x = raised * _power(raised, ones, 4.0)
    scale = _power(reduced, eights, 2.0**-8) * 8.0 * _power(raised, ones, 0.5)
    root = x * 0.59 + 0.417  # within 3.5 % for 1/4 <= x < 1
    for _ in range(4):
        root = (root + x / root) * 0.5
    return root * scale


def _count(x: Tensor, bounds: Sequence[float]) -> Tensor:
    """The number of bounds that ``x`` is below.

    Every bound is compared with ``x`` itself. A chain, in which each step uses the value before it
    several times, is inlined again and again by Inductor: minutes of compiling.
    """
    count = torch.zeros_like(x)
    for bound in bounds:
        count = count + (x < bound).to(x.dtype)
    return count


def _power(x: Tensor, bounds: Sequence[float], factor: float) -> Tensor:
    """``factor^n`` for the number ``n`` of bounds that ``x`` is below; see `_count`."""
    power = torch.ones_like(x)
    for bound in bounds:
        power = power * torch.where(x < bound, factor, 1.0).to(x.dtype)
    return power


def _cos_of_turn(turn: Tensor) -> Tensor:
    """``cos(2 pi turn)``, 0 <= turn < 1: the nearest quarter turn, and the angle that is left."""
    quarters = turn * 4.0
    nearest = torch.floor(quarters + 0.5)
    angle = (quarters - nearest) * (math.pi / 2)
    square = angle * angle
    cos, sin = _polynomial(_COS, square), _polynomial(_SIN, square) * angle
    is_odd = (nearest == 1.0) | (nearest == 3.0)
    value = torch.where(is_odd, sin, cos)
    return torch.where((nearest == 1.0) | (nearest == 2.0), -value, value)


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """``sum_k coefficients[k] x^k`` by Horner's rule."""
    result = x * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        result = result * x + coefficient
    return result
