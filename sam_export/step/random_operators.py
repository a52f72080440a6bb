"""What each random ATen operator draws under `Draws`: one function per operator and its kin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sam_export.errors import StepConfigError
from sam_export.step import distributions

if TYPE_CHECKING:
    from sam_export.step.draws import Draws

Form = Callable[..., Any]
"""(draws, *arguments of the operator) -> what the operator returns."""

FORMS: dict[Any, Form] = {}
"""Random ATen operator to what it does under `Draws`."""


def form(*schemas: str) -> Callable[[Form], Form]:
    """Registers what random operators (``aten::name.overload``) do under `Draws`."""

    def register(function: Form) -> Form:
        for schema in schemas:
            name, _, overload = schema.removeprefix("aten::").partition(".")
            target = getattr(getattr(torch.ops.aten, name), overload or "default")
            if target in FORMS:
                raise ValueError(f"{schema} has a form already: {FORMS[target].__name__}.")
            FORMS[target] = function
        return function

    return register


@form("aten::native_dropout")
def native_dropout(draws: Draws, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """native_dropout(Tensor input, float p, bool? train) -> (Tensor, Tensor)

    ``(x * mask / (1 - p), mask)``; the mask is true with probability ``1 - p``.
    """
    if train is False:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    mask = _mask(draws, x.shape, 1.0 - p)
    scale = 0.0 if p == 1 else 1.0 / (1.0 - p)
    return x * (mask.to(x.dtype) * scale), mask.clone()


@form("aten::bernoulli_.float")
def bernoulli_(draws: Draws, x: Tensor, p: float = 0.5) -> Tensor:
    """bernoulli_.float(Tensor(a!) self, float p=0.5, *, Generator? generator=None) -> Tensor(a!)"""
    return x.copy_(_mask(draws, x.shape, p))


@form("aten::bernoulli.p")
def bernoulli(draws: Draws, x: Tensor, p: float) -> Tensor:
    """bernoulli.p(Tensor self, float p, *, Generator? generator=None) -> Tensor"""
    return _mask(draws, x.shape, p).to(x.dtype)


@form("aten::bernoulli")
def bernoulli_of(draws: Draws, p: Tensor) -> Tensor:
    """bernoulli(Tensor self, *, Generator? generator=None) -> Tensor

    Both passes see the same uniform numbers, each beside its own probabilities.
    """
    return _mask_of(draws, p).to(p.dtype)


@form("aten::bernoulli_.Tensor")
def bernoulli_of_(draws: Draws, x: Tensor, p: Tensor) -> Tensor:
    """bernoulli_.Tensor(Tensor(a!) self, Tensor p, *, Generator? generator=None) -> Tensor(a!)"""
    return x.copy_(_mask_of(draws, p.expand(x.shape)))


@form("aten::rand")
def rand(draws: Draws, size: Sequence[int], dtype: Any = None, **where: Any) -> Tensor:
    """rand(SymInt[] size, *, ScalarType? dtype=None, ...) -> Tensor"""
    return _made(_uniform(draws, size, dtype or torch.get_default_dtype()), where)


@form("aten::rand_like")
def rand_like(draws: Draws, x: Tensor, dtype: Any = None, **where: Any) -> Tensor:
    """rand_like(Tensor self, *, ScalarType? dtype=None, ...) -> Tensor"""
    return _made(_uniform(draws, x.shape, dtype or x.dtype), where, x, dtype)


@form("aten::uniform_")
def uniform_(draws: Draws, x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """uniform_(Tensor(a!) self, float from=0, float to=1, *, Generator? generator=None)"""
    return x.copy_(_uniform(draws, x.shape, x.dtype, low, high))


@form("aten::randn")
def randn(draws: Draws, size: Sequence[int], dtype: Any = None, **where: Any) -> Tensor:
    """randn(SymInt[] size, *, ScalarType? dtype=None, ...) -> Tensor"""
    return _made(_normal(draws, size), where, dtype=dtype or torch.get_default_dtype())


@form("aten::randn_like")
def randn_like(draws: Draws, x: Tensor, dtype: Any = None, **where: Any) -> Tensor:
    """randn_like(Tensor self, *, ScalarType? dtype=None, ...) -> Tensor"""
    return _made(_normal(draws, x.shape), where, x, dtype)


@form("aten::normal_")
def normal_(draws: Draws, x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """normal_(Tensor(a!) self, float mean=0, float std=1, *, Generator? generator=None)"""
    return x.copy_(_normal(draws, x.shape) * std + mean)


@form("aten::normal.float_float")
def normal(
    draws: Draws, mean: float, std: float, size: Sequence[int], dtype: Any = None, **where: Any
) -> Tensor:
    """normal.float_float(float mean, float std, SymInt[] size, *, ...) -> Tensor"""
    values = _normal(draws, size) * std + mean
    return _made(values, where, dtype=dtype or torch.get_default_dtype())


@form("aten::normal.Tensor_float", "aten::normal.float_Tensor", "aten::normal.Tensor_Tensor")
def normal_of(draws: Draws, mean: Tensor | float = 0.0, std: Tensor | float = 1.0) -> Tensor:
    """normal.Tensor_Tensor(Tensor mean, Tensor std, *, Generator? generator=None) -> Tensor"""
    given = [value for value in (mean, std) if isinstance(value, Tensor)]
    size = torch.broadcast_shapes(*(value.shape for value in given))
    return (_normal(draws, size) * std + mean).to(given[0].dtype)


@form("aten::exponential_")
def exponential_(draws: Draws, x: Tensor, rate: float = 1.0) -> Tensor:
    """exponential_(Tensor(a!) self, float lambd=1, *, Generator? generator=None) -> Tensor(a!)"""
    make = lambda source: distributions.exponential(source.words, x.shape)  # noqa: E731
    return x.copy_(draws.draw("exponential", x.shape, make) / rate)


@form("aten::randint")
def randint(
    draws: Draws, high: int, size: Sequence[int], dtype: Any = torch.int64, **where: Any
) -> Tensor:
    """randint(SymInt high, SymInt[] size, *, ScalarType? dtype=long, ...) -> Tensor"""
    return _made(_integers(draws, size, 0, high), where, dtype=dtype)


@form("aten::randint.low")
def randint_low(
    draws: Draws, low: int, high: int, size: Sequence[int], dtype: Any = torch.int64, **where: Any
) -> Tensor:
    """randint.low(SymInt low, SymInt high, SymInt[] size, *, ScalarType? dtype=long, ...)"""
    return _made(_integers(draws, size, low, high), where, dtype=dtype)


@form("aten::randint_like")
def randint_like(draws: Draws, x: Tensor, high: int, dtype: Any = None, **where: Any) -> Tensor:
    """randint_like(Tensor self, SymInt high, *, ScalarType? dtype=None, ...) -> Tensor"""
    return _made(_integers(draws, x.shape, 0, high), where, x, dtype or x.dtype)


@form("aten::randint_like.low_dtype")
def randint_like_low(
    draws: Draws, x: Tensor, low: int, high: int, dtype: Any = None, **where: Any
) -> Tensor:
    """randint_like.low_dtype(Tensor self, SymInt low, SymInt high, *, ScalarType? dtype=None)"""
    return _made(_integers(draws, x.shape, low, high), where, x, dtype or x.dtype)


@form("aten::random_")
def random_(draws: Draws, x: Tensor) -> Tensor:
    """random_(Tensor(a!) self, *, Generator? generator=None) -> Tensor(a!)

    Integers: 0 to the dtype's greatest; floats: 0 to 2^mantissa, all of which they can hold.
    """
    if x.dtype.is_floating_point:
        high = int(2 / torch.finfo(x.dtype).eps) + 1
    else:
        high = 2 if x.dtype == torch.bool else min(torch.iinfo(x.dtype).max, 2**63 - 2) + 1
    return x.copy_(_integers(draws, x.shape, 0, high))


@form("aten::random_.to")
def random_to_(draws: Draws, x: Tensor, high: int) -> Tensor:
    """random_.to(Tensor(a!) self, int to, *, Generator? generator=None) -> Tensor(a!)"""
    return x.copy_(_integers(draws, x.shape, 0, high))


@form("aten::random_.from")
def random_from_(draws: Draws, x: Tensor, low: int, high: int | None) -> Tensor:
    """random_.from(Tensor(a!) self, int from, int? to, *, Generator? generator=None)"""
    highest = torch.iinfo(x.dtype).max if high is None else high
    return x.copy_(_integers(draws, x.shape, low, highest))


@form("aten::randperm")
def randperm(draws: Draws, count: int, dtype: Any = torch.int64, **where: Any) -> Tensor:
    """randperm(SymInt n, *, ScalarType? dtype=long, ...) -> Tensor"""
    make = lambda source: distributions.permutation(source.words, count)  # noqa: E731
    return _made(draws.draw("permutation", (count,), make), where, dtype=dtype)


@form("aten::rrelu_with_noise")
def rrelu_with_noise(
    draws: Draws,
    x: Tensor,
    noise: Tensor,
    lower: float = 0.125,
    upper: float = 1 / 3,
    training: bool = False,
) -> Tensor:
    """rrelu_with_noise(Tensor self, Tensor(b!) noise, Scalar lower=0.125, Scalar upper=1/3, ...)

    ``x`` where positive, else ``x`` times a uniform number between ``lower`` and ``upper``.
    """
    if not training:
        return torch.where(x > 0, x, x * ((lower + upper) / 2))
    slope = _uniform(draws, x.shape, x.dtype, float(lower), float(upper))
    noise.copy_(torch.where(x > 0, 1.0, slope))
    return x * noise


@form("aten::rrelu_with_noise_")
def rrelu_with_noise_(draws: Draws, x: Tensor, *arguments: Any) -> Tensor:
    """rrelu_with_noise_(Tensor(a!) self, Tensor(b!) noise, ...) -> Tensor(a!)"""
    return x.copy_(rrelu_with_noise(draws, x, *arguments))


# -- draws, shared by both passes; a model that may write to one gets a copy -----------------------


def _mask(draws: Draws, size: Sequence[int], p: float) -> Tensor:
    if not 0 <= p <= 1:
        raise StepConfigError(f"A probability of {p} was asked for; it lies between 0 and 1.")
    make = lambda source: distributions.bernoulli(source.words, source.mask, size, p)  # noqa: E731
    return draws.draw(f"bernoulli({p:g})", size, make)


def _mask_of(draws: Draws, p: Tensor) -> Tensor:
    words = draws.draw("bernoulli", p.shape, lambda source: source.words(p.shape, 0))
    return distributions.bernoulli_of(lambda size, part: words, p)


def _uniform(
    draws: Draws, size: Sequence[int], dtype: torch.dtype, low: float = 0.0, high: float = 1.0
) -> Tensor:
    if not dtype.is_floating_point:
        raise StepConfigError(f"Uniform numbers of {dtype} were asked for; give a floating dtype.")
    make = lambda source: distributions.uniform_between(source.words, size, dtype, low, high)  # noqa: E731
    return draws.draw(f"uniform({low:g}, {high:g}, {dtype})", size, make)


def _normal(draws: Draws, size: Sequence[int]) -> Tensor:
    make = lambda source: distributions.normal(source.words, size)  # noqa: E731
    return draws.draw("normal", size, make)


def _integers(draws: Draws, size: Sequence[int], low: int, high: int) -> Tensor:
    make = lambda source: distributions.integers(source.words, size, low, high)  # noqa: E731
    return draws.draw(f"integers({low}, {high})", size, make)


def _made(
    value: Tensor, where: Mapping[str, Any], like: Tensor | None = None, dtype: Any = None
) -> Tensor:
    """A copy of a draw with the dtype and on the device that the operator was asked for."""
    device = where.get("device") or (torch.get_default_device() if like is None else like.device)
    if dtype is None:
        dtype = value.dtype if like is None else like.dtype
    return value.to(device, dtype, copy=True)
