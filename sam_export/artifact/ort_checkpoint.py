"""The checkpoint file of onnxruntime-training: parameters, and the state of its optimizer.

ONNX Runtime's training API reads its parameters from such a file and hands them out by name, but
neither shows the moments of its optimizer nor takes them. They are in the file; so this reads and
writes it, with nothing but `flatbuffers`. Source: ``checkpoint.fbs`` and ``ort.fbs``,
https://github.com/microsoft/onnxruntime/tree/v1.19.2 (the last release of the training API), and
the generated classes in ``onnxruntime.tools.ort_format_model``, against which tests compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_export.errors import ArtifactError

VERSION = 2
"""Number of the layout that onnxruntime-training 1.19.2 reads and writes."""

IDENTIFIER = b"ODTC"
GROUP = "group0"
"""Name of the one group of an optimizer."""

LARGEST = 1 << 31
"""Bytes that a flatbuffer can hold; ONNX Runtime moves larger data to a second file."""

_TYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
}
_NUMBERS = {name: number for number, name in _TYPES.items()}


@dataclass(frozen=True)
class OptimizerGroup:
    """State of the stock optimizer.

    Attributes:
        step: Updates so far.
        learning_rate: The initial one; a loaded optimizer starts with it.
        moments: Parameter name to its moments, in the optimizer's order.
    """

    step: int
    learning_rate: float
    moments: dict[str, tuple[NDArray[Any], ...]]


@dataclass(frozen=True)
class OrtCheckpoint:
    """Content of a checkpoint file.

    Attributes:
        trainable: Parameters with a gradient, by name.
        frozen: The others: constants, and state that the training model writes itself.
        optimizer: State of the optimizer; None before its first step.
    """

    trainable: dict[str, NDArray[Any]]
    frozen: dict[str, NDArray[Any]] = field(default_factory=dict)
    optimizer: OptimizerGroup | None = None

    def to_bytes(self) -> bytes:
        """The file.

        Raises:
            ArtifactError: It would be larger than a flatbuffer can be.
        """
        tensors = [*self.trainable.values(), *self.frozen.values()]
        if self.optimizer is not None:
            tensors += [m for moments in self.optimizer.moments.values() for m in moments]
        size = sum(value.nbytes for value in tensors)
        if size > LARGEST - (1 << 20):
            raise ArtifactError(
                f"A checkpoint of onnxruntime-training with {size / 2**30:.1f} GiB does not fit "
                "into one file (2 GiB). Use target onnx or onnx-training for this model."
            )
        return _Writer(size).checkpoint(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> OrtCheckpoint:
        """The inverse of `to_bytes`; also for files that ONNX Runtime wrote.

        Raises:
            ArtifactError: Another format, version or kind of checkpoint, or it is cut short.
        """
        if data[4:8] != IDENTIFIER:
            raise ArtifactError("It is not a checkpoint of onnxruntime-training.")
        try:
            return _read(data)
        except ArtifactError:
            raise
        except Exception as error:  # offsets that lead outside raise whatever comes first
            raise ArtifactError(
                f"The checkpoint is damaged: {type(error).__name__}: {error}."
            ) from error


# -- writing --------------------------------------------------------------------------------------


class _Writer:
    """Tables are written from the leaves to the root, fields by the schema's slot numbers."""

    def __init__(self, size: int) -> None:
        import flatbuffers

        self._builder = flatbuffers.Builder(size + 4096)

    def checkpoint(self, content: OrtCheckpoint) -> bytes:
        b = self._builder
        trainable = self._tensors(content.trainable)
        frozen = self._tensors(content.frozen)
        module = self._table(4, {0: trainable, 1: frozen})
        groups = None
        if content.optimizer is not None:
            groups = self._vector([self._group(content.optimizer)])
        b.StartObject(4)
        b.PrependInt32Slot(0, VERSION, 0)
        b.PrependUOffsetTRelativeSlot(1, module, 0)
        if groups is not None:
            b.PrependUOffsetTRelativeSlot(2, groups, 0)
        b.Finish(b.EndObject(), file_identifier=IDENTIFIER)
        return bytes(b.Output())

    def _group(self, group: OptimizerGroup) -> int:
        b = self._builder
        states = []
        for name, moments in group.moments.items():
            held = self._tensors({f"momentum{i}": value for i, value in enumerate(moments)})
            states.append(self._table(2, {0: b.CreateString(name), 1: held}))
        vector, name_offset = self._vector(states), b.CreateString(GROUP)
        b.StartObject(4)
        b.PrependUOffsetTRelativeSlot(0, name_offset, 0)
        b.PrependInt64Slot(1, group.step, 0)
        b.PrependFloat32Slot(2, group.learning_rate, 0.0)
        b.PrependUOffsetTRelativeSlot(3, vector, 0)
        return int(b.EndObject())

    def _tensors(self, values: Mapping[str, NDArray[Any]]) -> int:
        return self._vector([self._tensor(name, value) for name, value in values.items()])

    def _tensor(self, name: str, value: NDArray[Any]) -> int:
        b = self._builder
        raw = b.CreateByteVector(np.ascontiguousarray(value).tobytes())
        b.StartVector(8, value.ndim, 8)
        for size in reversed(value.shape):
            b.PrependInt64(size)
        dims, text = b.EndVector(), b.CreateString(name)
        b.StartObject(7)
        b.PrependUOffsetTRelativeSlot(0, text, 0)
        b.PrependUOffsetTRelativeSlot(2, dims, 0)
        b.PrependInt32Slot(3, _NUMBERS[value.dtype.name], 0)
        b.PrependUOffsetTRelativeSlot(4, raw, 0)
        return int(b.EndObject())

    def _table(self, fields: int, offsets: Mapping[int, int]) -> int:
        self._builder.StartObject(fields)
        for slot, offset in offsets.items():
            self._builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
        return int(self._builder.EndObject())

    def _vector(self, offsets: Sequence[int]) -> int:
        self._builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self._builder.PrependUOffsetTRelative(offset)
        return int(self._builder.EndVector())


# -- reading --------------------------------------------------------------------------------------


class _Table:
    """One table of the file, its fields by slot number."""

    def __init__(self, data: bytes, position: int) -> None:
        from flatbuffers.table import Table

        self._table = Table(data, position)
        self._data = data

    def _offset(self, slot: int) -> int:
        return int(self._table.Offset(4 + 2 * slot))

    def number(self, slot: int, flags: Any, default: Any = 0) -> Any:
        offset = self._offset(slot)
        return self._table.Get(flags, self._table.Pos + offset) if offset else default

    def text(self, slot: int) -> str:
        return str(self._table.String(self._table.Pos + self._offset(slot)).decode())

    def table(self, slot: int) -> _Table:
        return _Table(self._data, self._table.Indirect(self._table.Pos + self._offset(slot)))

    def array(self, slot: int, dtype: str) -> NDArray[Any]:
        offset = self._offset(slot)
        if not offset:
            return np.zeros(0, dtype)
        start, count = self._table.Vector(offset), self._table.VectorLen(offset)
        return np.frombuffer(self._data, np.dtype(dtype), count, start)

    def tables(self, slot: int) -> list[_Table]:
        offset = self._offset(slot)
        if not offset:
            return []
        start = self._table.Vector(offset)
        count = self._table.VectorLen(offset)
        return [_Table(self._data, self._table.Indirect(start + 4 * i)) for i in range(count)]


def _read(data: bytes) -> OrtCheckpoint:
    import flatbuffers
    from flatbuffers import number_types as types

    root = _Table(data, flatbuffers.encode.Get(flatbuffers.packer.uoffset, data, 0))
    version = root.number(0, types.Int32Flags)
    if version != VERSION:
        raise ArtifactError(
            f"The checkpoint has layout {version}; this version of sam_export reads {VERSION}."
        )
    module = root.table(1)
    if module.number(2, types.BoolFlags, False) or module.number(3, types.BoolFlags, False):
        raise ArtifactError(
            "The checkpoint does not hold its tensors (it is nominal, or they are in another file)."
        )
    groups = root.tables(2)
    return OrtCheckpoint(
        trainable=dict(map(_tensor, module.tables(0))),
        frozen=dict(map(_tensor, module.tables(1))),
        optimizer=_read_group(groups[0], types) if groups else None,
    )


def _read_group(table: _Table, types: Any) -> OptimizerGroup:
    return OptimizerGroup(
        step=int(table.number(1, types.Int64Flags)),
        learning_rate=float(table.number(2, types.Float32Flags, 0.0)),
        moments={
            state.text(0): tuple(value for _, value in map(_tensor, state.tables(1)))
            for state in table.tables(3)
        },
    )


def _tensor(table: _Table) -> tuple[str, NDArray[Any]]:
    from flatbuffers import number_types as types

    dtype = _TYPES[table.number(3, types.Int32Flags)]
    shape = tuple(int(size) for size in table.array(2, "int64"))
    raw = table.array(4, "uint8")
    return table.text(0), np.frombuffer(raw.tobytes(), dtype).reshape(shape)
