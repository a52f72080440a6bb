"""Which dimensions of the batch are symbolic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sam_export.errors import StepConfigError

Dynamic = str | None | Mapping[str, Mapping[int, str]]
"""``"batch"``, None, or per input ``{"x": {0: "batch", 1: "time"}}``."""


def dims_of(
    dynamic: Dynamic, names: Sequence[str], values: Sequence[Tensor]
) -> list[dict[int, str]]:
    """Per batch tensor: dimension to the name of its symbolic size.

    ``"batch"`` marks dimension 0 of every tensor that has one; None marks nothing.

    Raises:
        StepConfigError: An unknown input, a dimension out of range, or one symbol with two sizes.
    """
    if dynamic is None:
        return [{} for _ in names]
    if isinstance(dynamic, str):
        if dynamic != "batch":
            raise StepConfigError(
                f"dynamic={dynamic!r}: expected 'batch', None or a dict such as "
                "{'x': {0: 'batch', 1: 'time'}}."
            )
        dims: list[dict[int, str]] = [{0: "batch"} if value.dim() else {} for value in values]
    else:
        unknown = sorted(set(dynamic) - set(names))
        if unknown:
            raise StepConfigError(
                f"dynamic names {', '.join(unknown)}; the batch has {', '.join(names)}."
            )
        dims = [dict(dynamic.get(name, {})) for name in names]
    sizes: dict[str, tuple[str, int]] = {}
    for name, value, marks in zip(names, values, dims, strict=True):
        for dim, symbol in marks.items():
            if not 0 <= dim < value.dim():
                raise StepConfigError(
                    f"dynamic marks dimension {dim} of {name!r}, whose shape is "
                    f"{list(value.shape)}."
                )
            first, size = sizes.setdefault(symbol, (name, value.shape[dim]))
            if size != value.shape[dim]:
                raise StepConfigError(
                    f"The symbolic size {symbol!r} is {size} in {first!r} and {value.shape[dim]} "
                    f"in dimension {dim} of {name!r}; one name stands for one size. Mark them "
                    "with dynamic={'input': {dim: 'name'}}."
                )
    return dims


def at_least_two(
    values: Sequence[Tensor], dims: Sequence[Mapping[int, str]], multiples: Mapping[str, int]
) -> list[Tensor]:
    """The examples with every symbolic size of 1 doubled, and every one that has parts of size 1.

    Tracing takes a size of 1 for a constant (it broadcasts), so such an example would not be
    symbolic; only shapes matter for a trace.
    """
    result = []
    for value, marks in zip(values, dims, strict=True):
        for dim, name in marks.items():
            if value.shape[dim] < 2 * multiples.get(name, 1):
                value = value.repeat_interleave(2, dim)
        result.append(value)
    return result
