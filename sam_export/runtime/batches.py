"""What a session is fed, checked against the contract before an engine sees it.

The checks copy no data, and neither torch nor ONNX Runtime is imported: a tensor or an ``OrtValue``
is known by what it offers.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_export.artifact.contract import BY_EXAMPLES, ProgramSpec, StepContract, TensorSpec
from sam_export.errors import SessionError

_NOT_NEGATIVE = ("lr", "rho")
_STRIDED = "torch.strided"
_OF_BATCH = "Batch tensor"

_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}
"""ONNX Runtime's names of element types where they are not NumPy's in ``tensor(...)``."""


def checked_batch(given: Sequence[Any], contract: StepContract, program: ProgramSpec) -> list[Any]:
    """The tensors that a program reads, in its order, after checking every one.

    Args:
        given: The positional arguments: tensors, or one tuple of them, or (where the step was
            captured with dict batches) one dict. A dict may also hold entries of the step's batch
            that this program does not read.
        contract: The step's contract.
        program: The program to feed.

    Returns:
        The very objects that were given: NumPy arrays, torch tensors or ``OrtValue``s.

    Raises:
        SessionError: Another kind or number of entries, another name, dtype, rank or size, sizes
            that contradict each other, or a size below the smallest that the step allows.
    """
    specs = [spec for spec in contract.batch if spec.name in program.reads]
    call = "step" if program.name == "base_step" else program.name
    if contract.batch_kind == "dict":
        tensors = _by_name(given, specs, contract, call)
    else:
        tensors = _by_position(given, specs, call)
    sizes: dict[str, tuple[int, str]] = {}
    for spec, tensor in zip(specs, tensors, strict=True):
        _check_tensor(spec, tensor)
        _collect_sizes(spec, tensor, sizes)
    for name, (size, where) in sizes.items():
        # What forbids a single example (the variance in BatchNorm) is part of training only.
        trains = program.name in BY_EXAMPLES
        least = contract.dims[name] if trains else min(contract.dims[name], 1)
        _check_least(name, size, least, where)
        if trains:
            _check_multiple(name, size, contract.multiples.get(name, 1), where)
    return tensors


def check_tensor(spec: TensorSpec, tensor: Any, what: str) -> None:
    """Checks one tensor of fixed shape by itself.

    Args:
        spec: What it has to be.
        tensor: What was given.
        what: How a message calls it.

    Raises:
        SessionError: It is no dense tensor, or of another dtype or shape.
    """
    _check_tensor(spec, tensor, what)
    _collect_sizes(spec, tensor, {}, what)


def contiguous(value: Any) -> NDArray[Any]:
    """A contiguous NumPy array of a batch entry, without a copy where that can be."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    elif _is_ort_value(value):
        value = value.numpy()
    array = np.asarray(value)
    return array if array.flags.c_contiguous else np.array(array, order="C")


def shape_of(value: Any) -> Sequence[int]:
    """The shape of a batch entry; that of an ``OrtValue`` is a method."""
    shape = value.shape
    return shape() if callable(shape) else shape  # type: ignore[no-any-return]


def merged_hyper(
    current: Mapping[str, tuple[float, ...]], given: Mapping[str, Any], contract: StepContract
) -> dict[str, tuple[float, ...]]:
    """The hyper-parameters after some were given anew; those omitted keep their value.

    Args:
        current: Name to one value per parameter group.
        given: Name to a number (for all groups) or one number per group.
        contract: The step's contract.

    Raises:
        SessionError: An unknown name, another number of values, or a value that is not a number,
            not finite, or negative where that has no meaning.
    """
    merged = dict(current)
    for name, value in given.items():
        if name not in current:
            raise SessionError(_unknown_hyper(name, current, contract))
        merged[name] = _per_group(name, value, len(contract.groups))
    return merged


def _by_position(given: Sequence[Any], specs: Sequence[TensorSpec], call: str) -> list[Any]:
    if len(given) == 1 and isinstance(given[0], (tuple, list)) and _holds_arrays(given[0]):
        given = given[0]
    if len(given) == 1 and isinstance(given[0], Mapping):
        raise SessionError(
            f"{call} was given a dict; this step was captured with batches that are tuples. "
            f"Pass {_names(specs)} by position."
        )
    if len(given) != len(specs):
        found = f"{len(given)} tensors" if given else "no batch"
        raise SessionError(
            f"{call} takes {len(specs)} tensors, {_names(specs)}; it was given {found}."
        )
    return list(given)


def _by_name(
    given: Sequence[Any], specs: Sequence[TensorSpec], contract: StepContract, call: str
) -> list[Any]:
    if len(given) != 1 or not isinstance(given[0], Mapping):
        found = ", ".join(type(item).__name__ for item in given) or "no batch"
        raise SessionError(
            f"{call} takes one dict with {_names(specs)}, since this step was captured with "
            f"batches that are dicts; it was given {found}."
        )
    batch = given[0]
    known = [spec.name for spec in contract.batch]
    for name in batch:
        if name not in known:
            raise SessionError(
                f"The batch of {call} has an entry {name!r} that this step does not know; it takes "
                f"{_names(specs)}.{_nearest(name, known)}"
            )
    missing = [spec.name for spec in specs if spec.name not in batch]
    if missing:
        raise SessionError(
            f"The batch of {call} lacks {', '.join(missing)}; it has "
            f"{', '.join(map(str, batch)) or 'no entries'}."
        )
    return [batch[spec.name] for spec in specs]


def _check_tensor(spec: TensorSpec, tensor: Any, what: str = _OF_BATCH) -> None:
    is_torch = all(hasattr(tensor, name) for name in ("shape", "dtype", "detach", "layout"))
    is_ort = not is_torch and _is_ort_value(tensor)
    if not is_torch and not is_ort and not isinstance(tensor, np.ndarray):
        raise SessionError(
            f"{what} {spec.name!r} is a {type(tensor).__name__}; expected a NumPy array, a torch "
            f"tensor or an OrtValue, {spec.description}. Convert it: numpy.asarray(value, "
            f"dtype={spec.dtype!r})."
        )
    if isinstance(tensor, np.ma.MaskedArray) or (is_torch and str(tensor.layout) != _STRIDED):
        raise SessionError(
            f"{what} {spec.name!r} is masked or sparse; expected a dense one, "
            f"{spec.description}. Fill it, or call to_dense()."
        )
    dtype = _ort_dtype(tensor) if is_ort else str(tensor.dtype).removeprefix("torch.")
    if dtype != spec.dtype:
        cast = f".to(torch.{spec.dtype})" if is_torch else f".astype({spec.dtype!r})"
        cast = ".numpy()" * is_ort + cast
        raise SessionError(
            f"{what} {spec.name!r} has dtype {dtype}; expected {spec.dtype}. Cast it: "
            f"{spec.name}{cast}."
        )
    shape = shape_of(tensor)
    if len(shape) != len(spec.shape):
        raise SessionError(
            f"{what} {spec.name!r} has shape {list(shape)}, {len(shape)} dimensions; expected "
            f"{len(spec.shape)}: {spec.description}."
        )


def _collect_sizes(
    spec: TensorSpec, tensor: Any, sizes: dict[str, tuple[int, str]], what: str = _OF_BATCH
) -> None:
    shape = shape_of(tensor)
    for dimension, (size, wanted) in enumerate(zip(shape, spec.shape, strict=True)):
        where = f"dimension {dimension} of {spec.name!r}"
        if isinstance(wanted, int):
            if size != wanted:
                raise SessionError(
                    f"{what} {spec.name!r} has shape {list(shape)}; expected "
                    f"{spec.description}: dimension {dimension} is {size} and must be {wanted}."
                )
            continue
        first, first_where = sizes.setdefault(wanted, (int(size), where))
        if size != first:
            raise SessionError(
                f"The batch has two sizes for {wanted!r}: {first} in {first_where}, {size} in "
                f"{where}. They must be equal."
            )


def _check_least(name: str, size: int, least: int, where: str) -> None:
    if size >= least:
        return
    if size == 0:
        raise SessionError(
            f"The batch is empty: {where} ({name!r}) is 0; this step needs at least {max(least, 1)}"
            "."
        )
    if size == 1:
        raise SessionError(
            f"Size 1 in {where} ({name!r}); this step was captured for at least {least}. "
            "Batch normalization, for one, cannot train on a single example: its variance is 0. "
            "Join the example to another batch, or leave it out."
        )
    raise SessionError(
        f"Size {size} in {where} ({name!r}); this step was captured for at least {least}."
    )


def _check_multiple(name: str, size: int, count: int, where: str) -> None:
    if size % count:
        raise SessionError(
            f"Size {size} in {where} ({name!r}); this step divides its batch into {count} parts of "
            f"one size (micro_batches={count}), so the size must be a multiple of {count}. Leave "
            f"{size % count} out, or join them to another batch."
        )


def _per_group(name: str, given: Any, groups: int) -> tuple[float, ...]:
    shown = given.tolist() if hasattr(given, "tolist") else given  # NumPy, torch
    values = [shown] * groups if _is_number(shown) else shown
    if not isinstance(values, (tuple, list)) or not all(map(_is_number, values)):
        raise SessionError(
            f"{name}={shown!r}: expected a number, or one number for each of the {groups} "
            "parameter groups."
        )
    if len(values) != groups:
        raise SessionError(
            f"{name}={shown!r} has {len(values)} values; this step has {groups} parameter groups. "
            "Give one number for all of them, or one for each."
        )
    try:
        numbers = tuple(float(value) for value in values)
    except OverflowError:
        numbers = (math.inf,)
    if not all(map(math.isfinite, numbers)):
        raise SessionError(f"{name}={shown!r} is not finite.")
    if name in _NOT_NEGATIVE and min(numbers, default=0.0) < 0:
        raise SessionError(f"{name}={shown!r} is negative; {name} is at least 0.")
    return numbers


def _unknown_hyper(name: str, current: Iterable[str], contract: StepContract) -> str:
    if any(spec.name == name for spec in contract.batch):
        how = "inside the one dict" if contract.batch_kind == "dict" else "by position"
        return f"{name!r} is a tensor of the batch, not a hyper-parameter: pass it {how}."
    known = sorted(current)
    return (
        f"Unknown hyper-parameter {name!r}; this step takes {', '.join(known) or 'none'}."
        f"{_nearest(name, known)} What is not listed is fixed in the graph: export the step again "
        "to change it."
    )


def _nearest(name: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_ort_value(value: Any) -> bool:
    return hasattr(value, "data_type") and hasattr(value, "device_name")


def _ort_dtype(value: Any) -> str:
    name = str(value.data_type())
    return _DTYPES.get(name, name.removeprefix("tensor(").removesuffix(")"))


def _holds_arrays(values: Sequence[Any]) -> bool:
    return all(hasattr(value, "shape") for value in values)


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.description}" for spec in specs)
