"""An LSTM or a GRU over a symbolic number of tokens: one operator that loops.

`torch.lstm` and `torch.gru` are traced as one copy of their cell per token, which fixes their
number. Where that is symbolic, `LoopedRecurrence` puts ``sam_export::lstm_steps`` or ``gru_steps``
there, and autograd their gradients. What needs no loop stays outside, as one matrix product over
all tokens: the part that the inputs have in the gates, and the gradients of both weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sam_export.errors import CaptureError
from sam_export.tracing.gru_steps import gru_steps
from sam_export.tracing.lstm_steps import lstm_steps

LOOPS: tuple[Callable[..., Any], ...] = (
    torch.ops.sam_export.lstm_steps.default,
    torch.ops.sam_export.lstm_steps_backward.default,
    torch.ops.sam_export.gru_steps.default,
    torch.ops.sam_export.gru_steps_backward.default,
)
"""Operators that loop inside, which only some targets can express."""


_RECURRENCES = ("lstm", "gru", "rnn_tanh", "rnn_relu")


class LoopedRecurrence(TorchFunctionMode):
    """While it is active, `torch.nn.LSTM` and `GRU` over a symbolic number of tokens are loops.

    Packed sequences and projections are left to torch, which fixes the number. Where there is
    dropout between layers, torch gets one layer at a time: its own decomposition forgets the
    dropout (``num_layers < i - 1`` in ``torch/_decomp/decompositions.py``, torch 2.13).

    Raises:
        CaptureError: A packed sequence with dropout between layers; a loop under autocast.
    """

    def loops(self, tokens: Any) -> bool:
        """Whether a recurrence over so many tokens is to be a loop."""
        return isinstance(tokens, torch.SymInt)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name not in _RECURRENCES or kwargs or len(args) != 9 or not isinstance(args[0], Tensor):
            return func(*args, **(kwargs or {}))
        if not isinstance(args[3], bool):  # data, batch_sizes, hx, weights, has_biases, ...
            layers, p, training = args[5:8]
            if layers > 1 and p and training:
                raise CaptureError(
                    f"The {name} over a packed sequence has dropout={p} between its layers, which "
                    "torch forgets when it traces it. Give it a padded tensor, or dropout=0."
                )
            return func(*args)
        x, hx, weights, biases, layers, p, training, both, batch_first = args
        stack = _Stack(weights, biases, layers, p if training else 0.0, both)
        gates = 4 if name == "lstm" else 3
        loops = (
            name in ("lstm", "gru")
            and self.loops(x.shape[1 if batch_first else 0])
            and weights[1].shape[0] == gates * weights[1].shape[1]  # no projection
        )
        if not loops and not (layers > 1 and p and training):
            return func(*args)
        if loops and torch.is_autocast_enabled(x.device.type):
            raise CaptureError(
                f"The {name} runs over a symbolic number of tokens, as a loop that autocast does "
                'not reach into. Capture with a fixed number (dynamic="batch"), or without '
                "autocast."
            )
        x = x.transpose(0, 1) if batch_first else x
        if not loops:
            y, *last = stack.layer_by_layer(func, x, hx)
        else:
            y, *last = stack.lstm(x, *hx) if name == "lstm" else stack.gru(x, hx)
        return (y.transpose(0, 1) if batch_first else y), *last


class _Stack:
    """The layers and directions of a recurrence, over ``x`` [tokens, batch, size]."""

    def __init__(
        self, weights: Sequence[Tensor], biases: bool, layers: int, dropout: float, both: bool
    ) -> None:
        count = len(weights) // (layers * (2 if both else 1))
        self._biases, self._weights = biases, weights
        self._own = [weights[i : i + count] for i in range(0, len(weights), count)]
        self._layers, self._dropout = layers, dropout
        self._directions = (False, True) if both else (False,)

    def lstm(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, last states, last cells."""
        cells = []

        def run(x: Tensor, number: int) -> Tensor:
            w_ih, w_hh, *bias = self._own[number]
            part = torch.nn.functional.linear(x, w_ih, bias[0] + bias[1] if bias else None)
            y: Tensor
            y, cell, _ = lstm_steps(part, h[number], c[number], w_hh)
            cells.append(cell[-1])
            return y

        y, states = self._through(x, run)
        return y, states, torch.stack(cells)

    def gru(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and last states."""

        def run(x: Tensor, number: int) -> Tensor:
            w_ih, w_hh, *bias = self._own[number]
            part = torch.nn.functional.linear(x, w_ih, bias[0] if bias else None)
            own = bias[1] if bias else w_hh.new_zeros(len(w_hh))
            y: Tensor
            y, _ = gru_steps(part, h[number], w_hh, own)
            return y

        return self._through(x, run)

    def layer_by_layer(self, func: Any, x: Tensor, hx: Any) -> tuple[Tensor, ...]:
        """Outputs and last states, by torch's own function for each layer."""
        ways = len(self._directions)
        size = len(self._weights) // self._layers
        last = []
        for layer in range(self._layers):
            own = slice(layer * ways, (layer + 1) * ways)
            first = hx[own] if isinstance(hx, Tensor) else tuple(state[own] for state in hx)
            if layer:
                x = torch.nn.functional.dropout(x, self._dropout)
            weights = self._weights[layer * size : (layer + 1) * size]
            x, *ends = func(x, first, weights, self._biases, 1, 0.0, True, ways > 1, False)
            last.append(ends)
        return x, *(torch.cat(parts) for parts in zip(*last, strict=True))

    def _through(self, x: Tensor, run: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
        states: list[Tensor] = []
        for layer in range(self._layers):
            if layer and self._dropout:
                x = torch.nn.functional.dropout(x, self._dropout)
            results = []
            for reverse in self._directions:
                y = run(x.flip(0) if reverse else x, len(states))
                states.append(y[-1])
                results.append(y.flip(0) if reverse else y)
            x = torch.cat(results, 2) if len(results) > 1 else results[0]
        return x, torch.stack(states)
