"""Where `sam-export train` takes its batches from: arrays in a file, or a user's function."""

from __future__ import annotations

import inspect
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sam_export.artifact.contract import StepContract, TensorSpec
from sam_export.cli.errors import CommandError
from sam_export.cli.function import call_function, load_function

Batch = tuple[Any, ...] | dict[str, Any]


class DataSource(Protocol):
    """Gives the batches of an epoch, the same ones each time it is asked for that epoch."""

    @property
    def examples(self) -> int | None:
        """Number of examples; None where it is not known."""

    def batches(self, epoch: int) -> Iterable[Any]:
        """The batches of an epoch; with ``len`` where their number is known beforehand."""


@dataclass(frozen=True)
class ArraySource:
    """Batches out of arrays that lie in memory, with the examples on axis 0.

    Attributes:
        arrays: One array for each tensor of the contract's batch, by name, in its order.
        contract: The step to feed.
        batch_size: Examples in a batch; the last one of an epoch may have fewer.
        least: The smallest batch that is used; what is left over below it is left out.
        multiple: What the size of each batch must be a multiple of; the rest is left out.
        seed: Of the order of the examples, which is another one in each epoch; None keeps the
            order of the arrays.
    """

    arrays: dict[str, NDArray[Any]]
    contract: StepContract
    batch_size: int
    least: int
    seed: int | None
    multiple: int = 1

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(next(iter(self.arrays.values())))

    @property
    def left_out(self) -> int:
        """Examples of each epoch that make no batch: too small a one, or no multiple."""
        rest = self.examples % self.batch_size
        return rest if rest < self.least else rest % self.multiple

    def batches(self, epoch: int) -> Iterable[Batch]:
        """The batches of an epoch; their order depends on the seed and the epoch alone."""
        order = None
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.examples)
        return _Epoch(self, order)


class _Epoch:
    def __init__(self, source: ArraySource, order: NDArray[np.int64] | None) -> None:
        self._source, self._order = source, order
        usable = self._usable = source.examples - source.left_out
        self._starts = range(0, usable, source.batch_size)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Batch]:
        source = self._source
        for start in self._starts:
            part: Any = slice(start, min(start + source.batch_size, self._usable))
            if self._order is not None:
                part = self._order[part]
            batch = {name: array[part] for name, array in source.arrays.items()}
            yield batch if source.contract.batch_kind == "dict" else tuple(batch.values())


@dataclass(frozen=True)
class FunctionSource:
    """Batches from a function of the user's.

    Attributes:
        name: As it was given.
        function: Returns an iterable of batches; is given ``epoch`` where it has such a parameter.
        takes_epoch: Whether it has.
    """

    name: str
    function: Callable[..., Any]
    takes_epoch: bool
    examples: int | None = None

    def batches(self, epoch: int) -> Iterable[Any]:
        """What the function returns."""
        keywords = {"epoch": epoch} if self.takes_epoch else {}
        returned = call_function(self.name, self.function, **keywords)
        if isinstance(returned, Mapping) or not isinstance(returned, Iterable):
            raise CommandError(
                f"{self.name} returned a {type(returned).__name__}; expected a list of batches, "
                "or something else to iterate over."
            )
        return returned


def open_source(
    text: str, contract: StepContract, batch_size: int, seed: int | None, training: bool
) -> DataSource:
    """The data that an argument like ``--data`` names.

    Args:
        text: A ``.npz`` file, or ``module:function``.
        contract: The step to feed.
        batch_size: Examples in a batch (arrays only).
        seed: Of the order of the examples (arrays only); None keeps their order.
        training: Whether the batches go to ``step``, which may forbid small ones.

    Raises:
        CommandError: The file or function is not there, or does not fit the contract.
    """
    if text.endswith(".npz") or ":" not in text:
        return _array_source(Path(text), contract, batch_size, seed, training)
    function = load_function(text)
    return FunctionSource(text, function, "epoch" in inspect.signature(function).parameters)


def _array_source(
    path: Path, contract: StepContract, batch_size: int, seed: int | None, training: bool
) -> ArraySource:
    if batch_size < 1:
        raise CommandError(f"--batch-size {batch_size}: at least 1 is needed.")
    arrays = read_arrays(path, contract)
    least = multiple = 1
    for spec in contract.batch:
        size = spec.shape[0]
        if isinstance(size, int):
            if batch_size != size:
                raise CommandError(
                    f"--batch-size {batch_size}: this artifact was exported for batches of "
                    f"exactly {size}. Use that, or export again with --dynamic batch."
                )
            least = size
        elif training:
            least = max(least, contract.dims[size])
            multiple = max(multiple, contract.multiples.get(size, 1))
    if batch_size < least:
        raise CommandError(f"--batch-size {batch_size}: this step takes at least {least} examples.")
    if batch_size % multiple:
        raise CommandError(
            f"--batch-size {batch_size}: this step divides its batch into {multiple} parts "
            f"(micro_batches), so it must be a multiple of {multiple}."
        )
    source = ArraySource(arrays, contract, batch_size, least, seed, multiple)
    if source.examples < least:
        raise CommandError(
            f"{path} has {source.examples} examples; one batch needs at least {least}."
        )
    return source


def read_arrays(path: Path, contract: StepContract) -> dict[str, NDArray[Any]]:
    """The arrays of a ``.npz`` file, by the contract's names, in its order.

    Arrays are found by the contract's names, or by position where the file has ``arr_0``, ....

    Raises:
        CommandError: The file is missing or damaged, or its arrays do not fit the contract.
    """
    if not path.is_file():
        raise CommandError(f"{path} does not exist; expected a .npz file or module:function.")
    try:
        with path.open("rb") as stream:
            arrays = _read_npz(path, np.load(stream, allow_pickle=False), contract)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise CommandError(f"{path} cannot be read as a .npz file: {error}.") from error
    for spec in contract.batch:
        _check_array(path, spec, arrays[spec.name])
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise CommandError(f"The arrays of {path} have different numbers of examples: {listed}.")
    return arrays


def _read_npz(path: Path, file: Any, contract: StepContract) -> dict[str, NDArray[Any]]:
    if isinstance(file, np.ndarray):
        raise CommandError(f"{path} holds one bare array; expected a .npz file of several.")
    names = [spec.name for spec in contract.batch]
    found = list(file.files)
    by_position = [f"arr_{index}" for index in range(len(names))]
    if set(names) <= set(found):
        wanted = names
    elif set(found) == set(by_position):
        wanted = by_position
    else:
        raise CommandError(
            f"{path} holds {', '.join(found) or 'nothing'}; expected {_listed(contract)}. "
            f"Write it with numpy.savez(path, {', '.join(f'{name}={name}' for name in names)})."
        )
    return {name: file[key] for name, key in zip(names, wanted, strict=True)}


def _check_array(path: Path, spec: TensorSpec, array: NDArray[Any]) -> None:
    if not spec.shape:
        raise CommandError(
            f"{spec.name} of this step is a single number, which cannot be cut into batches. Give "
            "--data module:function."
        )
    example = tuple(size for size in spec.shape[1:])
    fits = array.ndim == len(spec.shape) and all(
        isinstance(wanted, str) or wanted == size
        for wanted, size in zip(example, array.shape[1:], strict=True)
    )
    if array.dtype.name != spec.dtype or not fits:
        sizes = ", ".join(map(str, array.shape))
        raise CommandError(
            f"{spec.name} in {path} is {array.dtype}[{sizes}]; expected {spec.description}, with "
            f"all examples along axis 0. Write it with .astype({spec.dtype!r}) and that shape."
        )


def _listed(contract: StepContract) -> str:
    return ", ".join(f"{spec.name} {spec.description}" for spec in contract.batch)
