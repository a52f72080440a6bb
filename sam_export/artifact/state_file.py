"""Named tensors in one safetensors file: written so that a crash leaves no half of it, and checked.

Used for the initial state in an artifact and for checkpoints.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sam_export.artifact.contract import TensorSpec
from sam_export.errors import ArtifactError

T = TypeVar("T")

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
}

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name to its NumPy dtype name and shape."""


def write_state(
    path: Path, state: Mapping[str, NDArray[Any]], metadata: dict[str, str] | None = None
) -> None:
    """Writes tensors to ``path`` and waits until they are on the disk.

    Args:
        path: File to write; `replace_whole` makes it appear at once.
        state: Arrays by name, of any layout; 0-dimensional ones too.
        metadata: Text for the file's header. More than one entry makes the bytes differ from run
            to run, since safetensors orders them at random.

    Raises:
        OSError: The file cannot be written (full disk, no permission).
        ArtifactError: A tensor has a dtype that the format does not hold.
    """
    for name, array in state.items():
        if array.dtype.name not in _DTYPES.values():
            raise ArtifactError(
                f"Tensor {name!r} is {array.dtype}; a state file holds "
                f"{', '.join(_DTYPES.values())}. Cast it before writing."
            )
    # safetensors 0.8 writes the memory behind an array as it lies, so a transposed view would come
    # back as other numbers. (numpy.ascontiguousarray would turn 0 dimensions into 1.)
    plain = {
        name: np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
        for name, array in state.items()
    }
    try:
        save_file(plain, path, metadata)
    except SafetensorError as error:
        raise OSError(f"safetensors could not write {path.name}: {error}") from error
    sync(path)


def read_shapes(path: Path) -> tuple[Shapes, dict[str, str]]:
    """Dtype and shape of every tensor in a state file, and the text in its header.

    Raises:
        ArtifactError: The file is missing, cut off, or no safetensors file.
    """
    return _opened(path, _shapes)


def read_state(
    path: Path, check: Callable[[Shapes, dict[str, str]], None] = lambda shapes, metadata: None
) -> dict[str, NDArray[Any]]:
    """Every tensor of a state file, as arrays of their own memory.

    Args:
        path: The file.
        check: Sees what `read_shapes` gives before the tensors are read, and may raise. It is the
            same opening of the file: one that is replaced meanwhile is not mixed with the new one.

    Raises:
        ArtifactError: The file is missing, cut off, or no safetensors file.
    """

    def read(file: Any) -> dict[str, NDArray[Any]]:
        shapes, metadata = _shapes(file)
        check(shapes, metadata)
        return {name: file.get_tensor(name) for name in shapes}

    return _opened(path, read)


def differences(found: Shapes, expected: Iterable[TensorSpec]) -> list[str]:
    """What is missing, unknown, or of another dtype or shape; one line per tensor."""
    specs = {spec.name: spec for spec in expected}
    lines = [f"{name}: missing" for name in specs if name not in found]
    for name, (dtype, shape) in found.items():
        if name not in specs:
            lines.append(f"{name}: not a tensor of this step")
        elif (dtype, shape) != (specs[name].dtype, specs[name].shape):
            sizes = ", ".join(map(str, shape))
            lines.append(f"{name}: {dtype}[{sizes}], expected {specs[name].description}")
    return lines


def shapes_of(state: Mapping[str, NDArray[Any]]) -> Shapes:
    """Dtype and shape of every array, as `differences` compares them."""
    return {
        name: (array.dtype.name if array.dtype.isnative else str(array.dtype), array.shape)
        for name, array in state.items()
    }


def first_few(lines: list[str], limit: int = 4) -> str:
    """The first lines in one text, and how many more there are."""
    rest = len(lines) - limit
    return "; ".join(lines[:limit]) + (f"; and {rest} more" if rest > 0 else "")


def replace_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Puts a file at ``path`` that is never seen half written, whatever happens.

    Args:
        path: Where the file goes; what is there stays until the new one is complete.
        write: Writes and syncs the file at the temporary path that it is given.
    """
    final = Path(os.path.realpath(path))  # a link to a file keeps being a link
    partial = hidden_sibling(final)
    try:
        write(partial)
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)
    sync(final.parent)


def hidden_sibling(path: Path) -> Path:
    """A new name beside ``path``, on the same file system."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name != "posix":  # Windows cannot open folders, and needs no such call
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _opened(path: Path, read: Callable[[Any], T]) -> T:
    try:
        with safe_open(path, framework="np") as file:
            return read(file)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist.") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path} is damaged, cut off, or not a safetensors file: {error}."
        ) from error


def _shapes(file: Any) -> tuple[Shapes, dict[str, str]]:
    shapes = {}
    for name in file.keys():  # noqa: SIM118 - not a dict
        view = file.get_slice(name)
        code = str(view.get_dtype())
        shapes[name] = (_DTYPES.get(code, code), tuple(view.get_shape()))
    return shapes, dict(file.metadata() or {})
