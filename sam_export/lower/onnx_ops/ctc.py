"""Connectionist temporal classification, by the forward and backward recursions over time.

The labels of an example are spread with blanks between and around them, ``S = 2 L + 1`` in all.
With the log-probability ``p_t(s)`` of spread label ``s`` at time ``t``::

    alpha_t(s) = p_t(s) + logsumexp(alpha_{t-1}(s), alpha_{t-1}(s - 1), alpha_{t-1}(s - 2))
    beta_t(s)  = p_t(s) + logsumexp(beta_{t+1}(s),  beta_{t+1}(s + 1),  beta_{t+1}(s + 2))

where the step over two is allowed only to a label that differs from the one before its blank, and
``loss = -logsumexp(alpha_T(S - 1), alpha_T(S - 2))``. The number of time steps is fixed in the
graph; the lengths within it may differ.

Source: A. Graves et al., "Connectionist Temporal Classification", 2006,
    https://doi.org/10.1145/1143844.1143891, equations 6 to 16; ATen's LossCTC.cpp, whose gradient
    (taken with the softmax that made the log-probabilities) this is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sam_export.lower.onnx_ops.table import decomposition

Lengths = Tensor | Sequence[int]


@dataclass(frozen=True)
class _Labels:
    """The spread labels of a batch.

    Attributes:
        spread: int64 [batch, S].
        skips: Whether a spread label may follow the one two before it, [batch, S].
        inside: Which spread labels an example has, [batch, S].
        last: Number of spread labels of an example, int64 [batch, 1].
    """

    spread: Tensor
    skips: Tensor
    inside: Tensor
    last: Tensor


def _as_tensor(lengths: Lengths, like: Tensor) -> Tensor:
    if isinstance(lengths, Tensor):
        return lengths.to(torch.int64)
    return torch.tensor(list(lengths), dtype=torch.int64, device=like.device)


def _spread(targets: Tensor, lengths: Lengths, batch: int, blank: int) -> _Labels:
    length = _as_tensor(lengths, targets)
    if targets.dim() == 1:  # all labels in a row
        known = list(lengths) if not isinstance(lengths, Tensor) else None
        widest = max(known) if known else targets.shape[0]
        start = (length.cumsum(0) - length).unsqueeze(1)
        places = start + torch.arange(max(widest, 1), device=targets.device)
        padded = torch.cat([targets, targets.new_full([1], blank)])
        labels = padded[places.clamp_max(targets.shape[0])]
    else:
        labels = targets
    labels = labels.to(torch.int64)
    number = labels.shape[1]
    blanks = torch.full_like(labels, blank)
    spread = torch.stack([blanks, labels], 2).reshape(batch, 2 * number)
    spread = torch.cat([spread, torch.full_like(spread[:, :1], blank)], 1)
    last = (2 * length + 1).unsqueeze(1)
    inside = torch.arange(2 * number + 1, device=targets.device) < last
    spread = torch.where(inside, spread, blank)
    before = torch.cat([torch.full_like(spread[:, :2], blank), spread[:, :-2]], 1)
    return _Labels(spread, (spread != blank) & (spread != before), inside, last)


def _joined(first: Tensor, *others: Tensor) -> Tensor:
    """``logsumexp``, also where all are minus infinity."""
    parts = torch.stack([first, *others])
    most = parts.amax(0)
    safe = torch.where(torch.isinf(most), 0.0, most)
    return (parts - safe).exp().sum(0).log() + safe


def _moved(x: Tensor, by: int) -> Tensor:
    """``x[:, s - by]``, minus infinity where there is none; ``by`` may be negative."""
    rest = torch.full_like(x[:, : abs(by)], float("-inf"))
    if by > 0:
        return torch.cat([rest, x[:, :-by]], 1)
    return torch.cat([x[:, -by:], rest], 1)


def _forward(log_probs: Tensor, labels: _Labels) -> Tensor:
    """``alpha``, [batch, time, S]."""
    never = torch.full_like(labels.spread, float("-inf"), dtype=log_probs.dtype)
    places = torch.arange(labels.spread.shape[1], device=log_probs.device)
    alpha, steps = None, []
    for probs in log_probs.unbind(0):
        emitted = probs.gather(1, labels.spread)
        if alpha is None:
            alpha = torch.where((places < 2) & labels.inside, emitted, never)
        else:
            over = torch.where(labels.skips, _moved(alpha, 2), never)
            alpha = emitted + _joined(alpha, _moved(alpha, 1), over)
            alpha = torch.where(labels.inside, alpha, never)
        steps.append(alpha)
    return torch.stack(steps, 1)


def _ends(labels: _Labels) -> Tensor:
    """The spread labels that an example may end with: its last two."""
    places = torch.arange(labels.spread.shape[1], device=labels.spread.device)
    return (places >= labels.last - 2) & labels.inside


def _loss(alpha: Tensor, lengths: Tensor, labels: _Labels) -> Tensor:
    index = (lengths - 1).clamp_min(0).reshape(-1, 1, 1).expand(-1, 1, alpha.shape[2])
    last = alpha.gather(1, index).squeeze(1)
    last = torch.where(_ends(labels), last, float("-inf"))
    return -_joined(*last.unbind(1))


@decomposition("aten::_ctc_loss")
@decomposition("aten::_ctc_loss.Tensor")
def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Lengths,
    target_lengths: Lengths,
    blank: int = 0,
    zero_infinity: bool = False,
) -> tuple[Tensor, Tensor]:
    """aten::_ctc_loss(Tensor log_probs, Tensor targets, int[] input_lengths, int[] target_lengths,
    int blank=0, bool zero_infinity=False) -> (Tensor, Tensor)

    The loss of each example, and ``alpha``.
    """
    del zero_infinity  # the caller does that
    labels = _spread(targets, target_lengths, log_probs.shape[1], blank)
    alpha = _forward(log_probs, labels)
    return _loss(alpha, _as_tensor(input_lengths, targets), labels), alpha


@decomposition("aten::_ctc_loss_backward")
@decomposition("aten::_ctc_loss_backward.Tensor")
def ctc_loss_backward(
    grad: Tensor,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Lengths,
    target_lengths: Lengths,
    neg_log_likelihood: Tensor,
    log_alpha: Tensor,
    blank: int,
    zero_infinity: bool = False,
) -> Tensor:
    """aten::_ctc_loss_backward(Tensor grad, Tensor log_probs, Tensor targets, int[] input_lengths,
    int[] target_lengths, Tensor neg_log_likelihood, Tensor log_alpha, int blank, bool
    zero_infinity=False) -> Tensor

    ``grad * (exp(p_t(c)) - exp(logsumexp_{s: label c}(alpha_t(s) + beta_t(s)) + loss - p_t(c)))``,
    zero behind an example's own length.
    """
    labels = _spread(targets, target_lengths, log_probs.shape[1], blank)
    lengths = _as_tensor(input_lengths, targets).unsqueeze(1)
    never = torch.full_like(labels.spread, float("-inf"), dtype=log_probs.dtype)
    alpha = _forward(log_probs, labels)
    count = log_probs.shape[0]
    beta, parts = never, []
    # A label that skips may be reached from two before it: so from s, s + 2 decides.
    ahead = torch.cat([labels.skips[:, 2:], torch.zeros_like(labels.skips[:, :2])], 1)
    hits = labels.spread.unsqueeze(2) == torch.arange(log_probs.shape[2], device=grad.device)
    for time in reversed(range(count)):
        emitted = log_probs[time].gather(1, labels.spread)
        over = torch.where(ahead, _moved(beta, -2), never)
        later = emitted + _joined(beta, _moved(beta, -1), over)
        final = torch.where(_ends(labels), emitted, never)
        beta = torch.where(lengths - 1 == time, final, later)
        beta = torch.where(labels.inside & (time < lengths), beta, never)
        paths = (alpha[:, time] + beta).unsqueeze(2)
        collected = torch.where(hits & labels.inside.unsqueeze(2), paths, float("-inf"))
        most = collected.amax(1)
        safe = torch.where(torch.isinf(most), 0.0, most)
        total = (collected - safe.unsqueeze(1)).exp().sum(1).log() + safe
        probs = log_probs[time]
        share = (total + neg_log_likelihood.unsqueeze(1) - probs).exp()
        parts.append(torch.where(time < lengths, probs.exp() - share, 0.0))
    result = torch.stack(parts[::-1], 0) * grad.reshape(1, -1, 1)
    if zero_infinity:
        result = torch.where(torch.isinf(neg_log_likelihood).reshape(1, -1, 1), 0.0, result)
    return result
