"""Values on the device of an ONNX Runtime session, and how they get there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_export.runtime.batches import contiguous

_TYPES = {
    name: np.dtype(name).type
    for name in (
        "float16",
        "float32",
        "float64",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "bool",
    )
}


class OrtValues:
    """Makes values on one device.

    Args:
        ort: The ``onnxruntime`` module.
        kind: ``cpu`` or ``cuda``.
        index: Number of the device.
    """

    def __init__(self, ort: ModuleType, kind: str, index: int) -> None:
        self._ort = ort
        self.kind = kind
        self.index = index
        self.share_memory = kind == "cpu"  # with the arrays that they are made of

    def of(self, array: NDArray[Any]) -> Any:
        """An ``OrtValue`` of an array: a copy on a CUDA device, the array's own memory on the CPU.

        The caller keeps the array alive on the CPU.
        """
        return self._ort.OrtValue.ortvalue_from_numpy(array, self.kind, self.index)

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """A new buffer for one result.

        What a binding allocates itself it hands out by reference, and replaces at the next run:
        a result of an earlier step would change under its reader.
        """
        return self._ort.OrtValue.ortvalue_from_shape_and_type(
            shape, _TYPES[dtype], self.kind, self.index
        )

    def bind_inputs(self, binding: Any, inputs: Mapping[str, Any]) -> list[Any]:
        """Binds inputs by name; returns what has to stay alive while the graph runs."""
        own, held = self._ort.OrtValue, []
        for name, value in inputs.items():
            if isinstance(value, own):
                binding.bind_ortvalue_input(name, value)
                held.append(value)
            else:
                held.append(self.bind_batch(binding, name, value))
        return held

    def bind_batch(self, binding: Any, name: str, value: Any) -> Any:
        """Binds a tensor of the batch as an input; returns what has to stay alive while it runs.

        A torch tensor on the very device is read where it is: torch's stream is waited for, since
        ONNX Runtime has one of its own.
        """
        if self._is_here(value):
            import torch

            tensor = value.detach().contiguous()
            torch.cuda.current_stream(tensor.device).synchronize()
            dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
            binding.bind_input(
                name, self.kind, self.index, dtype.type, list(tensor.shape), tensor.data_ptr()
            )
            return tensor
        array = contiguous(value)
        held = self.of(array)
        binding.bind_ortvalue_input(name, held)
        return array, held

    def _is_here(self, value: Any) -> bool:
        return self.kind == "cuda" and (
            getattr(value, "is_cuda", False) and value.device.index == self.index
        )
