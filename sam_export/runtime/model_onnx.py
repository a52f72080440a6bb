"""The model to serve as an ONNX file; needs NumPy and ONNX Runtime, neither torch nor onnx."""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_export.artifact.contract import StepContract
from sam_export.artifact.folder import Artifact
from sam_export.artifact.state_file import replace_whole, sync
from sam_export.errors import ArtifactError, SessionError
from sam_export.runtime import onnx_protobuf as pb
from sam_export.runtime.detect import require_onnxruntime

MESSAGE_LIMIT = 2**31 - 1
"""Bytes: a protobuf message cannot be larger. Beyond, the weights get a file of their own."""

_ALIGNMENT = 4096
"""Of a tensor in the file of weights: then a runtime can map it into memory."""

Chunk = bytes | memoryview


@dataclass(frozen=True)
class Weights:
    """The tensors that go into a model.

    Attributes:
        arrays: By name, in the dtypes that the graph reads.
    """

    arrays: dict[str, NDArray[Any]]

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum(array.nbytes for array in self.arrays.values())

    def inside(self) -> list[Chunk]:
        """Fields of a graph that hold them."""
        chunks: list[Chunk] = []
        for name, array in self.arrays.items():
            head = _described(name, array)
            raw = pb.message_head(pb.TENSOR_RAW, array.nbytes)
            size = len(head) + len(raw) + array.nbytes
            chunks += [pb.message_head(pb.GRAPH_INITIALIZER, size), head, raw, _bytes(array)]
        return chunks

    def elsewhere(self, file_name: str) -> list[Chunk]:
        """Fields of a graph that say where in another file they are."""
        chunks: list[Chunk] = []
        for (name, array), offset in zip(self.arrays.items(), self._offsets(), strict=True):
            entries = {"location": file_name, "offset": str(offset), "length": str(array.nbytes)}
            parts = [_described(name, array)]
            for key, value in entries.items():
                entry = pb.bytes_field(pb.ENTRY_KEY, key) + pb.bytes_field(pb.ENTRY_VALUE, value)
                parts.append(pb.bytes_field(pb.TENSOR_EXTERNAL, entry))
            parts.append(pb.number_field(pb.TENSOR_LOCATION, pb.EXTERNAL))
            chunks.append(pb.bytes_field(pb.GRAPH_INITIALIZER, b"".join(parts)))
        return chunks

    def in_a_file(self) -> list[Chunk]:
        """The content of that file."""
        chunks: list[Chunk] = []
        at = 0
        for array, offset in zip(self.arrays.values(), self._offsets(), strict=True):
            chunks += [bytes(offset - at), _bytes(array)]
            at = offset + array.nbytes
        return chunks

    def _offsets(self) -> list[int]:
        offsets, at = [], 0
        for array in self.arrays.values():
            offsets.append(-(-at // _ALIGNMENT) * _ALIGNMENT)
            at = offsets[-1] + array.nbytes
        return offsets


def write(artifact: Artifact, path: Path, state: Mapping[str, NDArray[Any]]) -> None:
    """Writes the program ``evaluate`` with its parameters and buffers as initializers.

    Inputs and outputs keep their names, dtypes and symbolic sizes; inputs that the graph does not
    read are left out. A model of 2 GiB or more keeps its weights in ``<name>.<digest>.data`` beside
    it. ONNX Runtime has loaded the file, with its default options, before it gets its name.

    Raises:
        SessionError: ONNX Runtime does not load it.
        ArtifactError: The artifact's file is no ONNX model of its contract.
        OSError: The disk refuses; what was there is still whole.
    """
    source = artifact.file("evaluate")
    try:
        model = _Model(source.read_bytes(), artifact.contract, state)
    except (ValueError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{source} is not the model of its contract: {error}.") from error
    old = _data_file_of(path)
    data: Path | None = None
    if model.size > MESSAGE_LIMIT:
        chunks = model.weights.in_a_file()
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        data = path.with_name(f"{path.name}.{digest.hexdigest()[:16]}.data")
        replace_whole(data, lambda partial: _write(partial, chunks))

    def fill(partial: Path) -> None:
        _write(partial, model.chunks(data.name if data else None))
        _load(partial, path, artifact)

    try:
        replace_whole(path, fill)
    except BaseException:
        if data is not None and data != old:
            data.unlink(missing_ok=True)
        raise
    if old is not None and old != data:
        with suppress(OSError):  # the new model is complete without that
            old.unlink(missing_ok=True)


class _Model:
    """A program in ONNX, taken apart.

    Args:
        data: The bytes of its file, whose state is graph inputs.
        contract: Says which inputs are a batch's.
        state: Parameters and buffers by name.

    Raises:
        ValueError: The bytes are no such model.
    """

    def __init__(
        self, data: bytes, contract: StepContract, state: Mapping[str, NDArray[Any]]
    ) -> None:
        parts = list(pb.fields(data))
        (graph,) = (part.message for part in parts if part.number == pb.MODEL_GRAPH)
        self._around: list[Chunk] = [part.whole for part in parts if part.number != pb.MODEL_GRAPH]
        read = pb.names_read(graph)
        batch = {spec.name for spec in contract.batch}
        arrays: dict[str, NDArray[Any]] = {}
        self._graph: list[Chunk] = [pb.bytes_field(pb.GRAPH_NAME, "evaluate")]
        for part in pb.fields(graph):
            if part.number == pb.GRAPH_INPUT:
                found = pb.field_of(part.message, pb.VALUE_NAME)
                name = found.text if found else ""
                if name in batch:
                    if name in read:
                        self._graph.append(part.whole)
                elif name not in state:
                    raise ValueError(f"it has the input {name!r}, which the contract does not know")
                elif name in read:
                    dtype = pb.dtype_of(part.message).newbyteorder("<")
                    arrays[name] = np.asarray(state[name], dtype=dtype, order="C")
            elif part.number != pb.GRAPH_NAME:
                self._graph.append(part.whole)
        self.weights = Weights(arrays)
        # A field's own keys and sizes are small beside this.
        self.size = len(data) + self.weights.size + 256 * len(arrays) + sum(map(len, arrays))

    def chunks(self, data_file: str | None) -> list[Chunk]:
        """The bytes of the model; its weights are inside, or in the file of that name."""
        weights = self.weights.elsewhere(data_file) if data_file else self.weights.inside()
        graph = [*self._graph, *weights]
        head = pb.message_head(pb.MODEL_GRAPH, sum(map(len, graph)))
        return [*self._around, head, *graph]


def _described(name: str, array: NDArray[Any]) -> bytes:
    sizes = b"".join(pb.number_field(pb.TENSOR_DIMS, size) for size in array.shape)
    dtype = pb.number_field(pb.TENSOR_DTYPE, pb.DTYPES[array.dtype.name])
    return sizes + dtype + pb.bytes_field(pb.TENSOR_NAME, name)


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _write(path: Path, chunks: Sequence[Chunk]) -> None:
    with path.open("wb") as file:
        file.writelines(chunks)
    sync(path)


def _load(partial: Path, path: Path, artifact: Artifact) -> None:
    """Lets ONNX Runtime load a file as anybody would who serves it: on the CPU, no option set."""
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        ort.InferenceSession(str(partial), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own, which derive from nothing narrower
        double = any(spec.dtype == "float64" for spec in artifact.contract.state)
        reason = (
            " Its optimizers fuse float64 nodes, too, into operators that it has in float32 only: "
            "a model in float32 would load."
        )
        raise SessionError(
            f"ONNX Runtime {ort.__version__} does not load the model with its default options, so "
            f"{path} was not written.{reason if double else ''} `Session.evaluate` runs it from "
            f"{artifact.path}. {error}"
        ) from error


def _data_file_of(path: Path) -> Path | None:
    """The file of weights of a model that is there already and was written by `write`."""
    try:
        with path.open("rb") as file:  # only the parts that are looked at are read
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        graph = pb.field_of(content, pb.MODEL_GRAPH)
        for field in pb.fields(graph.message) if graph else ():
            if field.number == pb.GRAPH_INITIALIZER:
                for part in pb.fields(field.message):
                    if part.number == pb.TENSOR_EXTERNAL:
                        value = pb.field_of(part.message, pb.ENTRY_VALUE)
                        pattern = re.escape(path.name) + r"\.[0-9a-f]{16}\.data"
                        if value and re.fullmatch(pattern, value.text):
                            return path.with_name(value.text)
    except (OSError, ValueError):  # UnicodeDecodeError is one: it is another kind of file
        return None
    return None
