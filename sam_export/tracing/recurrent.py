"""An LSTM over a symbolic number of tokens: one operator that loops, in place of a copy per token.

`torch.lstm` is traced as one copy of its cell per token, which fixes their number. Where that is
symbolic, `LoopedRecurrence` puts ``sam_export::lstm_steps`` there, and autograd its gradient. What
needs no loop stays outside, as one matrix product over all tokens: the part that the inputs have in
the gates, and the gradients of both weights.

With ``x[t]`` the inputs' part (``W_ih x + b_ih + b_hh``), ``w = W_hh`` and gates in torch's order::

    i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of the quarters of x[t] + h[t-1] w^T
    c[t] = f * c[t-1] + i * g
    h[t] = o * tanh(c[t])

Source: S. Hochreiter, J. Schmidhuber, "Long Short-Term Memory", 1997, as `torch.nn.LSTM` has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@torch.library.custom_op("sam_export::lstm_steps", mutates_args=())
def lstm_steps(x: Tensor, h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All steps of one layer in one direction.

    Args:
        x: The inputs' part of the gates, [tokens, batch, 4 * hidden].
        h: First state, [batch, hidden].
        c: First cell, [batch, hidden].
        w: Weight of the state, [4 * hidden, hidden].

    Returns:
        States and cells, [tokens, batch, hidden], and the gates after their activations,
        [tokens, batch, 4 * hidden].
    """
    states, cells, gates = [], [], []
    for part in x.unbind():
        i, f, g, o = (part + h @ w.t()).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        h = o * c.tanh()
        states.append(h)
        cells.append(c)
        gates.append(torch.cat((i, f, g, o), 1))
    return torch.stack(states), torch.stack(cells), torch.stack(gates)


@lstm_steps.register_fake
def _(x: Tensor, h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1], w.shape[1])
    return x.new_empty(shape), x.new_empty(shape), torch.empty_like(x)


@torch.library.custom_op("sam_export::lstm_steps_backward", mutates_args=())
def lstm_steps_backward(
    dstates: Tensor, dcells: Tensor, gates: Tensor, cells: Tensor, before: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `lstm_steps`, from the last token to the first.

    With ``dh`` and ``dc`` what comes from the token behind, zero at the last one::

        dh = dstates[t] + dh;  dc = dcells[t] + dc + dh * o * (1 - tanh(c[t])^2)
        dx[t] = dc * g * i * (1 - i), dc * c[t-1] * f * (1 - f), dc * i * (1 - g^2),
                dh * tanh(c[t]) * o * (1 - o)
        dh = dx[t] w;  dc = dc * f

    Args:
        dstates: Gradient of the states, [tokens, batch, hidden].
        dcells: Gradient of the cells, [tokens, batch, hidden].
        gates: The gates, [tokens, batch, 4 * hidden].
        cells: The cells, [tokens, batch, hidden].
        before: The cells before each token, [tokens, batch, hidden].
        w: Weight of the state, [4 * hidden, hidden].

    Returns:
        Gradients of ``x`` [tokens, batch, 4 * hidden], of the first state and of the first cell
        [batch, hidden].
    """
    dh, dc = torch.zeros_like(dstates[0]), torch.zeros_like(dcells[0])
    parts: list[Tensor] = []
    for t in range(len(gates) - 1, -1, -1):
        i, f, g, o = gates[t].chunk(4, 1)
        bent = cells[t].tanh()
        dh = dstates[t] + dh
        dc = dcells[t] + dc + dh * o * (1 - bent * bent)
        quarters = (
            dc * g * i * (1 - i),
            dc * before[t] * f * (1 - f),
            dc * i * (1 - g * g),
            dh * bent * o * (1 - o),
        )
        parts.append(torch.cat(quarters, 1))
        dh, dc = parts[-1] @ w, dc * f
    return torch.stack(parts[::-1]), dh, dc


@lstm_steps_backward.register_fake
def _(
    dstates: Tensor, dcells: Tensor, gates: Tensor, cells: Tensor, before: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (gates.shape[1], w.shape[1])
    return torch.empty_like(gates), gates.new_empty(shape), gates.new_empty(shape)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    _, h, c, w = inputs
    states, cells, gates = output
    ctx.mark_non_differentiable(gates)
    ctx.save_for_backward(h, c, w, states, cells, gates)


def _backward(
    ctx: Any, dstates: Tensor | None, dcells: Tensor | None, _: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, c, w, states, cells, gates = ctx.saved_tensors
    dstates = torch.zeros_like(states) if dstates is None else dstates
    dcells = torch.zeros_like(cells) if dcells is None else dcells
    dx, dh, dc = lstm_steps_backward(dstates, dcells, gates, cells, _shifted(c, cells), w)
    dw = dx.flatten(0, 1).t() @ _shifted(h, states).flatten(0, 1)
    return dx, dh, dc, dw


lstm_steps.register_autograd(_backward, setup_context=_remember)


def _shifted(first: Tensor, following: Tensor) -> Tensor:
    """What was there before each token."""
    return torch.cat((first.unsqueeze(0), following))[:-1]


class LoopedRecurrence(TorchFunctionMode):
    """While it is active, `torch.nn.LSTM` over a symbolic number of tokens is `lstm_steps`.

    Packed sequences and projections are left to torch, which fixes the number.
    """

    def loops(self, tokens: Any) -> bool:
        """Whether an LSTM over so many tokens is to be a loop."""
        return isinstance(tokens, torch.SymInt)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") == "lstm" and not kwargs and len(args) == 9:
            x, hx, weights, biases, layers, p, training, both, batch_first = args
            per_layer = 4 if biases else 2
            if (
                self.loops(x.shape[1 if batch_first else 0])
                and len(weights) == per_layer * layers * (2 if both else 1)
                and hx[0].shape[-1] == weights[1].shape[-1]
            ):
                x = x.transpose(0, 1) if batch_first else x
                dropout = p if training else 0.0
                y, h, c = _lstm(x, hx, weights, per_layer, layers, dropout, both)
                return (y.transpose(0, 1) if batch_first else y), h, c
        return func(*args, **(kwargs or {}))


def _lstm(
    x: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    per_layer: int,
    layers: int,
    dropout: float,
    both: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    states, cells = [], []
    own = iter(range(len(weights) // per_layer))
    for layer in range(layers):
        if layer and dropout:
            x = torch.nn.functional.dropout(x, dropout)
        results = []
        for reverse in (False, True) if both else (False,):
            number = next(own)
            w_ih, w_hh, *bias = weights[number * per_layer : (number + 1) * per_layer]
            given = x.flip(0) if reverse else x
            part = torch.nn.functional.linear(given, w_ih, bias[0] + bias[1] if bias else None)
            y, cell, _ = lstm_steps(part, hx[0][number], hx[1][number], w_hh)
            states.append(y[-1])
            cells.append(cell[-1])
            results.append(y.flip(0) if reverse else y)
        x = torch.cat(results, 2) if both else results[0]
    return x, torch.stack(states), torch.stack(cells)


LOOPS: tuple[Callable[..., Any], ...] = (
    torch.ops.sam_export.lstm_steps.default,
    torch.ops.sam_export.lstm_steps_backward.default,
)
"""Operators of this module: they loop inside, which only some targets can express."""
