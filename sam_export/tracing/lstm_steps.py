"""``sam_export::lstm_steps``: all tokens of one layer of an LSTM as one operator, with gradient.

With ``x[t]`` the inputs' part (``W_ih x + b_ih + b_hh``), ``w = W_hh`` and gates in torch's order::

    i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of the quarters of x[t] + h[t-1] w^T
    c[t] = f * c[t-1] + i * g
    h[t] = o * tanh(c[t])

Source: S. Hochreiter, J. Schmidhuber, "Long Short-Term Memory", 1997, as `torch.nn.LSTM` has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
    dx, dh, dc = lstm_steps_backward(dstates, dcells, gates, cells, shifted(c, cells), w)
    dw = dx.flatten(0, 1).t() @ shifted(h, states).flatten(0, 1)
    return dx, dh, dc, dw


lstm_steps.register_autograd(_backward, setup_context=_remember)


def shifted(first: Tensor, following: Tensor) -> Tensor:
    """What was there before each token."""
    return torch.cat((first.unsqueeze(0), following))[:-1]
