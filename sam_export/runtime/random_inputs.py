"""Fills the random inputs that an ONNX program has; imports no torch."""

from __future__ import annotations

import ast
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from sam_export.artifact import philox
from sam_export.errors import ArtifactError

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}

_MANY = 1 << 16
"""Numbers from which on a second thread pays."""


@dataclass(frozen=True)
class RandomInput:
    """One input of random words or of a random mask.

    Attributes:
        name: Of the graph input.
        stream: Of the generator; see `artifact.philox`.
        size: Per dimension a number, or an expression in symbolic sizes (``64*batch``).
        threshold: Of the mask; None: words.
    """

    name: str
    stream: int
    size: tuple[int | str, ...]
    threshold: int | None

    @classmethod
    def read(cls, item: Mapping[str, Any]) -> RandomInput:
        """One entry of the manifest."""
        threshold = int(item["threshold"]) if "threshold" in item else None
        return cls(str(item["input"]), int(item["stream"]), tuple(item["size"]), threshold)

    @property
    def dtype(self) -> str:
        """Of the graph input."""
        return "int32" if self.threshold is None else "bool"

    def make(self, seed: int, step: int, shape: Sequence[int]) -> NDArray[Any]:
        """Its value in a step."""
        count = math.prod(shape)
        if self.threshold is None:
            return philox.random_words(seed, step, self.stream, count).reshape(shape)
        return philox.random_mask(seed, step, self.stream, count, self.threshold).reshape(shape)


class RandomInputs:
    """The random inputs of every program of an artifact.

    Args:
        details: ``details`` of the manifest.
        threads: How many threads make them; None: one per CPU.

    Raises:
        ArtifactError: The words come from another generator, or the entry is malformed.
    """

    def __init__(self, details: Mapping[str, Any], threads: int | None) -> None:
        numbers = details.get("random_numbers", {"generator": philox.NAME, "inputs": {}})
        if numbers.get("generator") != philox.NAME:
            raise ArtifactError(
                f"The step draws from the generator {numbers.get('generator')!r}; this version of "
                f"sam_export has {philox.NAME}. Use the version that wrote the artifact."
            )
        try:
            self._inputs = {
                program: tuple(RandomInput.read(item) for item in items)
                for program, items in numbers["inputs"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"`random_numbers` in the manifest is malformed: {error!r}.") from (
                error
            )
        self._pool = ThreadPoolExecutor(threads or os.cpu_count() or 1)

    def of(self, program: str) -> tuple[RandomInput, ...]:
        """The inputs of a program, in the order of its graph."""
        return self._inputs.get(program, ())

    def values(
        self, program: str, seed: int, step: int, sizes: Mapping[str, int]
    ) -> dict[str, NDArray[Any]]:
        """Name of each input to its value.

        Args:
            program: Whose inputs.
            seed: State ``rng.seed``.
            step: State ``counter.step``.
            sizes: Symbolic size to its value in this batch.
        """
        items = self.of(program)
        shapes = [tuple(_value(size, sizes) for size in item.size) for item in items]

        def make(item: RandomInput, shape: Sequence[int]) -> NDArray[Any]:
            return item.make(seed, step, shape)

        many = sum(map(math.prod, shapes)) >= _MANY
        made = (self._pool.map if many else map)(make, items, shapes)
        return {item.name: value for item, value in zip(items, made, strict=True)}


def _value(size: int | str, sizes: Mapping[str, int]) -> int:
    """A size that is a number or an expression in named sizes.

    Raises:
        ArtifactError: It is something else.
    """
    if type(size) is int:
        return size

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name) and node.id in sizes:
            return sizes[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ArtifactError(f"The size {size!r} in the manifest cannot be computed.")

    try:
        return value(ast.parse(str(size), mode="eval").body)
    except SyntaxError as error:
        raise ArtifactError(f"The size {size!r} in the manifest cannot be read.") from error
