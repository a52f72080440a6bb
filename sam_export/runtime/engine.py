"""The seam between `Session` and what really runs a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

LARGE_BLOCK = 31 << 20
"""Bytes: glibc learns from freed blocks of up to 32 MiB that such sizes are worth keeping."""


class Engine(Protocol):
    """Runs the programs of one artifact on one device and holds the training state there.

    A `Session` validates everything before it calls an engine; an engine may trust what it gets.
    """

    provider: str
    """What really runs the graph (``CPUExecutionProvider``, ``inductor``), for reports."""

    @property
    def facts(self) -> dict[str, Any]:
        """JSON values on which its numbers may depend, for reports.

        ``graphs`` (file name to SHA-256) and what the runtime itself says of its settings.
        """

    def bind(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Copies the whole state to the device and makes it the current one."""

    def run(
        self, program: str, batch: Sequence[Any], hyper: Mapping[str, NDArray[Any]]
    ) -> dict[str, Any]:
        """Runs one program on the current state.

        Args:
            program: ``step`` replaces the current state by the new one (unless the semantics say
                that a step that is not finite changes nothing, and it is not); the others leave it.
            batch: NumPy arrays, torch tensors or ``OrtValue``s, in the order of the program's batch
                inputs; then, for a stage, what else it is given (`StepContract.fed`), which may
                also be what `run` or `current` of this engine returned.
            hyper: Keyword of the hyper-parameter (``lr``) to its float64[groups] array.

        Returns:
            Every output that is not state, by name, as the engine's own objects; they stay valid
            after later runs.
        """

    def current(self, names: Sequence[str]) -> dict[str, Any]:
        """The named state tensors where they are, for `run`; a step changes them."""

    def read(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Copies of the named state tensors, on the host."""

    def to_numpy(self, value: Any) -> NDArray[Any]:
        """A host copy of something that `run` returned; waits for the device."""
