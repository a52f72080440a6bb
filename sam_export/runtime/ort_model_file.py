"""Reads the nodes of a model file in ONNX Runtime's own format (``.ort``), and where each runs.

Such a file is what a session writes of its graph after all optimizations and after every node got
its execution provider; it names the provider of each node, also inside the branches of an ``If``,
and holds the copies between devices as nodes (``MemcpyToHost``, ``MemcpyFromHost``). The format is
a FlatBuffers table (``onnxruntime/core/flatbuffers/schema/ort.fbs``, file identifier ``ORTM``);
fields are only ever added to it. The few that are read here are the same in 1.19.2 and 1.31.1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

# Numbers of the fields in ort.fbs.
_SESSION_MODEL = 1
_MODEL_GRAPH = 7
_GRAPH_NODES, _GRAPH_INPUTS, _GRAPH_OUTPUTS = 2, 5, 6
_NODE_NAME, _NODE_DOMAIN, _NODE_OP, _NODE_PROVIDER = 0, 2, 5, 7
_NODE_INPUTS, _NODE_OUTPUTS, _NODE_ATTRIBUTES, _NODE_IMPLICIT = 8, 9, 10, 12
_ATTRIBUTE_GRAPH = 7

_IDENTIFIER = b"ORTM"


@dataclass(frozen=True)
class PlacedNode:
    """One node of a graph as a session runs it.

    Attributes:
        name: Its name; ONNX Runtime makes up names for nodes that it adds.
        op: Its operator.
        domain: Of the operator; empty for ONNX's own.
        provider: Name of the execution provider that runs it.
        inputs: Names of the values that it reads, those inside its branches included.
        outputs: Names of the values that it makes.
    """

    name: str
    op: str
    domain: str
    provider: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class PlacedGraph:
    """A graph as a session runs it.

    Attributes:
        nodes: All its nodes, those of branches included.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
    """

    nodes: tuple[PlacedNode, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_placed_graph(data: bytes) -> PlacedGraph:
    """The graph of a model file in ONNX Runtime's format.

    Raises:
        ValueError: The bytes are not such a file.
    """
    if data[4:8] != _IDENTIFIER:
        raise ValueError(f"not a model in ONNX Runtime's format: it starts with {data[:8]!r}")
    try:
        session = _Table(data, struct.unpack_from("<I", data, 0)[0])
        model = session.table(_SESSION_MODEL)
        graph = model and model.table(_MODEL_GRAPH)
        if graph is None:
            raise ValueError("it holds no graph")
        return PlacedGraph(
            tuple(_nodes(graph)), graph.texts(_GRAPH_INPUTS), graph.texts(_GRAPH_OUTPUTS)
        )
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"a model in ONNX Runtime's format that is damaged: {error}") from error


def _nodes(graph: _Table) -> Iterator[PlacedNode]:
    for node in graph.tables(_GRAPH_NODES):
        yield PlacedNode(
            node.text(_NODE_NAME),
            node.text(_NODE_OP),
            node.text(_NODE_DOMAIN),
            node.text(_NODE_PROVIDER),
            (*filter(None, node.texts(_NODE_INPUTS)), *node.texts(_NODE_IMPLICIT)),
            tuple(filter(None, node.texts(_NODE_OUTPUTS))),
        )
        for attribute in node.tables(_NODE_ATTRIBUTES):
            branch = attribute.table(_ATTRIBUTE_GRAPH)
            if branch is not None:
                yield from _nodes(branch)


class _Table:
    """A FlatBuffers table: an offset to a list of field offsets, then the fields."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at
        self._fields = at - struct.unpack_from("<i", data, at)[0]
        self._size = struct.unpack_from("<H", data, self._fields)[0]

    def _place(self, field: int) -> int | None:
        """Where what the field points at begins; None: the field is absent."""
        entry = 4 + 2 * field
        if entry >= self._size:
            return None
        offset = struct.unpack_from("<H", self._data, self._fields + entry)[0]
        return self._pointed(self._at + offset) if offset else None

    def _pointed(self, at: int) -> int:
        return at + int(struct.unpack_from("<I", self._data, at)[0])

    def _elements(self, field: int) -> list[int]:
        at = self._place(field)
        if at is None:
            return []
        count = struct.unpack_from("<I", self._data, at)[0]
        return [self._pointed(at + 4 + 4 * index) for index in range(count)]

    def _text(self, at: int) -> str:
        size = struct.unpack_from("<I", self._data, at)[0]
        return self._data[at + 4 : at + 4 + size].decode()

    def table(self, field: int) -> _Table | None:
        at = self._place(field)
        return None if at is None else _Table(self._data, at)

    def tables(self, field: int) -> list[_Table]:
        return [_Table(self._data, at) for at in self._elements(field)]

    def text(self, field: int) -> str:
        at = self._place(field)
        return "" if at is None else self._text(at)

    def texts(self, field: int) -> tuple[str, ...]:
        return tuple(map(self._text, self._elements(field)))
