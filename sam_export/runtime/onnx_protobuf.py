"""The few parts of an ONNX file that are changed without the package ``onnx``: protobuf by hand.

A message is a row of fields: a key (number and kind), then the value. Fields that nothing is to be
done with are passed on as the bytes that they are, so nothing is lost that this file does not know.
Numbers of fields: ``onnx/onnx.proto`` of ONNX 1.16; they never change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_NAME, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT = 1, 2, 5, 11, 12
VALUE_NAME, VALUE_TYPE = 1, 2
TYPE_TENSOR, TENSOR_ELEMENT = 1, 1
NODE_INPUT, NODE_NAME, NODE_OP, NODE_ATTRIBUTE = 1, 3, 4, 5
ATTRIBUTE_NAME, ATTRIBUTE_INT, ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS = 1, 3, 6, 11
TENSOR_DIMS, TENSOR_DTYPE, TENSOR_NAME, TENSOR_RAW = 1, 2, 8, 9
TENSOR_EXTERNAL, TENSOR_LOCATION = 13, 14
ENTRY_KEY, ENTRY_VALUE = 1, 2

EXTERNAL = 1
"""Of ``TensorProto.DataLocation``: the numbers are in a file of their own."""

DTYPES = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "uint16": 4,
    "int16": 5,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "float64": 11,
    "uint32": 12,
    "uint64": 13,
}
"""NumPy's name of an element type to ``TensorProto.DataType``."""

BFLOAT16 = 16
"""``TensorProto.DataType`` of the type that NumPy does not have."""

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5


@dataclass(frozen=True)
class Field:
    """One field of a message.

    Attributes:
        number: Which one.
        whole: Its bytes, with the key.
        value: Its value: a number, or the bytes of a text or message.
    """

    number: int
    whole: memoryview
    value: int | memoryview

    @property
    def message(self) -> memoryview:
        """The bytes of a message.

        Raises:
            ValueError: It is a number.
        """
        if isinstance(self.value, int):
            raise ValueError(f"field {self.number} is a number where a message belongs")
        return self.value

    @property
    def text(self) -> str:
        """A text; `ValueError` when it is none."""
        return bytes(self.message).decode()


def fields(data: bytes | memoryview) -> Iterator[Field]:
    """The fields of a message, in order.

    Raises:
        ValueError: The bytes are no message, or cut off.
    """
    view, at = memoryview(data), 0
    while at < len(view):
        start = at
        key, at = _number(view, at)
        kind = key & 7
        value: int | memoryview
        if kind == _VARINT:
            value, at = _number(view, at)
        elif kind in (_EIGHT, _FOUR, _BYTES):
            size = 8 if kind == _EIGHT else 4
            if kind == _BYTES:
                size, at = _number(view, at)
            value, at = view[at : at + size], at + size
        else:
            raise ValueError(f"a field of the unknown kind {kind}")
        if at > len(view):
            raise ValueError("it is cut off")
        yield Field(key >> 3, view[start:at], value)


def field_of(data: bytes | memoryview, number: int) -> Field | None:
    """The last field of that number, which is the one that counts; None without."""
    return {field.number: field for field in fields(data)}.get(number)


def number_field(number: int, value: int) -> bytes:
    """A field with a number of at least 0."""
    return _varint(number << 3 | _VARINT) + _varint(value)


def bytes_field(number: int, value: bytes | str) -> bytes:
    """A field with a text, bytes, or a message."""
    content = value.encode() if isinstance(value, str) else value
    return message_head(number, len(content)) + content


def message_head(number: int, size: int) -> bytes:
    """What comes before the ``size`` bytes of a message that is a field."""
    return _varint(number << 3 | _BYTES) + _varint(size)


def names_read(graph: bytes | memoryview) -> set[str]:
    """Names of all values that the nodes of a graph read, in branches and loops too.

    Raises:
        ValueError: The bytes are no ``GraphProto``.
    """
    names: set[str] = set()
    for field in fields(graph):
        if field.number == GRAPH_OUTPUT:
            found = field_of(field.message, VALUE_NAME)
            names |= {found.text} if found else set()
        if field.number != GRAPH_NODE:
            continue
        for part in fields(field.message):
            if part.number == NODE_INPUT:
                names.add(part.text)
            elif part.number == NODE_ATTRIBUTE:
                for inner in fields(part.message):
                    if inner.number in (ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS):
                        names |= names_read(inner.message)
    return names


def first_cast_to(graph: bytes | memoryview, element: int) -> str | None:
    """Name of the first node that casts to an element type, in branches and loops too.

    Args:
        graph: A ``GraphProto``.
        element: ``TensorProto.DataType``.

    Returns:
        None where there is no such node.

    Raises:
        ValueError: The bytes are no ``GraphProto``.
    """
    for field in fields(graph):
        if field.number != GRAPH_NODE:
            continue
        parts = list(fields(field.message))
        texts = {part.number: part.text for part in parts if part.number in (NODE_NAME, NODE_OP)}
        for part in parts:
            if part.number != NODE_ATTRIBUTE:
                continue
            inner = {entry.number: entry for entry in fields(part.message)}
            if texts.get(NODE_OP) == "Cast" and inner[ATTRIBUTE_NAME].text == "to":
                if inner[ATTRIBUTE_INT].value == element:
                    return texts.get(NODE_NAME, "")
            elif ATTRIBUTE_GRAPH in inner:
                found = first_cast_to(inner[ATTRIBUTE_GRAPH].message, element)
                if found is not None:
                    return found
    return None


def dtype_of(value: bytes | memoryview) -> np.dtype[np.generic]:
    """The element type of a ``ValueInfoProto``.

    Raises:
        ValueError: It is no tensor, or of a type that NumPy does not have.
    """
    kind = field_of(value, VALUE_TYPE)
    tensor = kind and field_of(kind.message, TYPE_TENSOR)
    element = tensor and field_of(tensor.message, TENSOR_ELEMENT)
    for name, number in DTYPES.items():
        if element and number == element.value:
            return np.dtype(name)
    raise ValueError(f"a value of element type {element and element.value}")


def _number(view: memoryview, at: int) -> tuple[int, int]:
    """A number in base 128, lowest digits first, and where it ends."""
    value = shift = 0
    while True:
        if at >= len(view) or shift > 63:
            raise ValueError("it is cut off")
        byte = view[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    digits.append(value)
    return bytes(digits)
