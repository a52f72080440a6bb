"""What a program of ONNX Runtime is called with, worked out once instead of at every call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sam_export.artifact.contract import ProgramSpec, TensorSpec
from sam_export.runtime.batches import shape_of
from sam_export.runtime.ort_values import OrtValues


class OrtCall:
    """The inputs that a program is fed, and the results that it gives.

    Args:
        spec: The program.
        items: The inputs that are given at each call, in order (`StepContract.fed`).

    Attributes:
        fed: Their names.
    """

    def __init__(self, spec: ProgramSpec, items: Sequence[TensorSpec]) -> None:
        self.fed = tuple(item.name for item in items)
        # A size is read off the first tensor that has it; the session has compared the others.
        places: dict[str, tuple[int, int]] = {}
        for index, item in enumerate(items):
            for dim, size in enumerate(item.shape):
                if isinstance(size, str):
                    places.setdefault(size, (index, dim))
        self._places = tuple((size, *place) for size, place in places.items())
        self._results = [output for output in spec.outputs if output.name not in spec.feeds]
        self._fixed = all(isinstance(n, int) for item in self._results for n in item.shape)

    def sizes(self, given: Sequence[Any]) -> dict[str, int]:
        """Symbolic size to its value in this call."""
        return {size: int(shape_of(given[index])[dim]) for size, index, dim in self._places}

    def bind_results(
        self, binding: Any, values: OrtValues, sizes: Mapping[str, int]
    ) -> dict[str, Any]:
        """Binds a new buffer for each result; returns them by name."""
        results = {}
        for output in self._results:
            shape: Any = output.shape
            if not self._fixed:
                shape = [sizes[size] if isinstance(size, str) else size for size in shape]
            value = values.empty(shape, output.dtype)
            binding.bind_ortvalue_output(output.name, value)
            results[output.name] = value
        return results
