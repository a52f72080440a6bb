"""The random numbers of one step: every draw that a model makes, taken from (seed, step, draw)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sam_export.artifact.philox import STREAMS_PER_DRAW
from sam_export.errors import StepConfigError
from sam_export.step.philox import DrawSource
from sam_export.step.random_operators import FORMS

# Where torch's own generator stands while the mode is on. Its seed is the number of the next draw:
# `torch.utils.checkpoint` puts it back before it recomputes, and so the same draws come again.
_START = 0x5EED << 40
_MOST = 1 << 30


class Draws(TorchDispatchMode):
    """While it is active, random ATen operators draw from Philox instead of torch's generator.

    Draws are numbered in the order in which the model makes them; number ``d`` reads the streams
    ``2 d`` and ``2 d + 1`` (see `artifact.philox.random_words`). Torch's generators are put back
    when it ends.

    Args:
        seed: int64 scalar.
        step: int64 scalar: number of the step.
        same: Whether later passes see the draws of the first one.
        first_stream: Added to every stream.

    Raises:
        StepConfigError: The model draws in a way that has no form here, asks for a generator of its
            own, seeds torch's, or draws other things in the second pass than in the first.
    """

    def __init__(self, seed: Tensor, step: Tensor, same: bool, first_stream: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed, self._step = seed, step
        self._same = same
        self._first_stream = first_stream
        self._drawn: dict[int, tuple[str, Tensor | None]] = {}
        self._first = 0
        self._left = contextlib.ExitStack()

    @property
    def count(self) -> int:
        """How many draws there were."""
        return len(self._drawn)

    def at(self, stage: str) -> None:
        """Told the name of a stage before it begins: each pass may draw the same again.

        A ``part`` of the batch with passes of its own goes on with numbers that are not drawn yet.
        """
        if stage == "part":
            self._forget()
            self._first = self.count
            torch.default_generator.manual_seed(_START + self._first)
        if stage in ("ascent", "descent") and self._same:
            torch.default_generator.manual_seed(_START + self._first)

    def draw(self, what: str, size: Sequence[int], make: Callable[[DrawSource], Tensor]) -> Tensor:
        """The next draw; not to be written to.

        Args:
            what: The operator and what it depends on, to compare both passes.
            size: Shape of the draw.
            make: Makes the draw.
        """
        number = torch.default_generator.initial_seed() - _START
        if not 0 <= number < _MOST:
            raise StepConfigError(
                "The model seeds torch's generator in its forward pass. The draws of a step come "
                "from its own seed and step number; remove that, or use "
                'Semantics(generator="torch").'
            )
        torch.default_generator.manual_seed(_START + number + 1)
        signature = f"{what}{[str(extent) for extent in size]}"
        before, value = self._drawn.get(number, (signature, None))
        if before != signature:
            raise StepConfigError(
                f"Draw {number} is {before} in the first pass and {signature} in the second, so "
                "the passes cannot see the same random numbers. Use "
                'Semantics(randomness="fresh").'
            )
        if value is None:
            stream = self._first_stream + STREAMS_PER_DRAW * number
            value = make(DrawSource(self._seed, self._step, stream))
            self._drawn[number] = (signature, value if self._same else None)
        return value

    def __enter__(self) -> Draws:
        self._left.enter_context(torch.random.fork_rng(devices=[]))
        if self._seed.device.type == "cuda":
            self._left.enter_context(_MathAttention())
        torch.default_generator.manual_seed(_START)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._forget()
        self._left.close()

    def _forget(self) -> None:
        """Lets go of what was drawn; the numbers stay taken."""
        self._drawn = {number: (what, None) for number, (what, _) in self._drawn.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operator; a random one by its form."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        generator = kwargs.pop("generator", None)
        if generator is not None:
            raise StepConfigError(
                f"{func} is given a torch.Generator, which cannot be part of a step. Leave it out; "
                "the step has a seed of its own."
            )
        if func in FORMS:
            return FORMS[func](self, *args, **kwargs)
        if without_dropout(func, args, kwargs):
            return func(*args, **kwargs)
        raise StepConfigError(
            f"{func} cannot be drawn from the step's own generator yet. Use "
            'Semantics(generator="torch"), for which only the torch targets can be built.'
        )


def without_dropout(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the operator is only tagged random for a dropout that is off here."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout", "dropout_p"):
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            return not (argument.default_value if given is None else given)
    return False


class _MathAttention(TorchFunctionMode):
    """Attention with dropout in its plain form: the fused CUDA kernels draw inside."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs a function of torch."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            probability = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
            if probability:
                math = torch.nn.attention.SDPBackend.MATH
                with torch.nn.attention.sdpa_kernel(math):
                    return func(*args, **kwargs)
        return func(*args, **kwargs)
