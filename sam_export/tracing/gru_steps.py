"""``sam_export::gru_steps``: all tokens of one layer of a GRU as one operator, with gradient.

With ``x[t]`` the inputs' part (``W_ih x + b_ih``), ``w = W_hh``, ``b = b_hh`` and gates in torch's
order, thirds named ``r``, ``z``, ``n``::

    u = h[t-1] w^T + b
    r, z = sigmoid(x_r + u_r), sigmoid(x_z + u_z)
    n = tanh(x_n + r * u_n)
    h[t] = n + z * (h[t-1] - n)

Source: K. Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014,
https://arxiv.org/abs/1406.1078, as `torch.nn.GRU` has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sam_export.tracing.lstm_steps import shifted


@torch.library.custom_op("sam_export::gru_steps", mutates_args=())
def gru_steps(x: Tensor, h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """All steps of one layer in one direction.

    Args:
        x: The inputs' part of the gates, [tokens, batch, 3 * hidden].
        h: First state, [batch, hidden].
        w: Weight of the state, [3 * hidden, hidden].
        b: Its bias, [3 * hidden].

    Returns:
        States, [tokens, batch, hidden], and for each token ``r``, ``z``, ``n`` and ``u_n``,
        [tokens, batch, 4 * hidden].
    """
    states, gates = [], []
    for part in x.unbind():
        x_r, x_z, x_n = part.chunk(3, 1)
        u_r, u_z, u_n = (h @ w.t() + b).chunk(3, 1)
        r, z = (x_r + u_r).sigmoid(), (x_z + u_z).sigmoid()
        n = (x_n + r * u_n).tanh()
        h = n + z * (h - n)
        states.append(h)
        gates.append(torch.cat((r, z, n, u_n), 1))
    return torch.stack(states), torch.stack(gates)


@gru_steps.register_fake
def _(x: Tensor, h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    tokens, batch, hidden = x.shape[0], x.shape[1], w.shape[1]
    return x.new_empty((tokens, batch, hidden)), x.new_empty((tokens, batch, 4 * hidden))


@torch.library.custom_op("sam_export::gru_steps_backward", mutates_args=())
def gru_steps_backward(
    dstates: Tensor, gates: Tensor, before: Tensor, w: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `gru_steps`, from the last token to the first.

    With ``dh`` what comes from the token behind, zero at the last one::

        dh = dstates[t] + dh
        dn = dh * (1 - z) * (1 - n^2)
        dx[t] = dn * u_n * r * (1 - r), dh * (h[t-1] - n) * z * (1 - z), dn
        dh = dh * z + (dx_r, dx_z, dn * r) w

    Args:
        dstates: Gradient of the states, [tokens, batch, hidden].
        gates: What `gru_steps` returned, [tokens, batch, 4 * hidden].
        before: The states before each token, [tokens, batch, hidden].
        w: Weight of the state, [3 * hidden, hidden].

    Returns:
        Gradients of ``x`` [tokens, batch, 3 * hidden] and of the first state [batch, hidden].
    """
    dh = torch.zeros_like(dstates[0])
    parts: list[Tensor] = []
    for t in range(len(gates) - 1, -1, -1):
        r, z, n, u_n = gates[t].chunk(4, 1)
        dh = dstates[t] + dh
        dn = dh * (1 - z) * (1 - n * n)
        dr = dn * u_n * r * (1 - r)
        dz = dh * (before[t] - n) * z * (1 - z)
        parts.append(torch.cat((dr, dz, dn), 1))
        dh = dh * z + torch.cat((dr, dz, dn * r), 1) @ w
    return torch.stack(parts[::-1]), dh


@gru_steps_backward.register_fake
def _(dstates: Tensor, gates: Tensor, before: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    tokens, batch, hidden = gates.shape[0], gates.shape[1], w.shape[1]
    return gates.new_empty((tokens, batch, 3 * hidden)), gates.new_empty((batch, hidden))


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    _, h, w, _ = inputs
    states, gates = output
    ctx.mark_non_differentiable(gates)
    ctx.save_for_backward(h, w, states, gates)


def _backward(ctx: Any, dstates: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, w, states, gates = ctx.saved_tensors
    before = shifted(h, states)
    dx, dh = gru_steps_backward(dstates, gates, before, w)
    hidden = w.shape[1]
    # Of the state's part: the new gate's third went through r.
    du = torch.cat((dx[..., : 2 * hidden], dx[..., 2 * hidden :] * gates[..., :hidden]), -1)
    dw = du.flatten(0, 1).t() @ before.flatten(0, 1)
    return dx, dh, dw, du.sum((0, 1))


gru_steps.register_autograd(_backward, setup_context=_remember)
