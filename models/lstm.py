"""An LSTM (or a GRU) that reads a passage and says which character comes next.

Sources: S. Hochreiter, J. Schmidhuber, "Long Short-Term Memory", 1997,
https://doi.org/10.1162/neco.1997.9.8.1735; A. Graves, "Generating Sequences With Recurrent Neural
Networks", 2013, https://arxiv.org/abs/1308.0850, section 3 (characters); K. Cho et al., "Learning
Phrase Representations using RNN Encoder-Decoder", 2014, https://arxiv.org/abs/1406.1078 (GRU).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from models.gpt import characters

if TYPE_CHECKING:
    import sam_export as sx


KINDS: dict[str, type[nn.LSTM] | type[nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}
"""Name to recurrence."""


class LSTMClassifier(nn.Module):
    """Embedding, `torch.nn.LSTM` or `GRU`, the output of the last token to the logits.

    Args:
        vocabulary: Number of different tokens.
        width: Size of a token's vector.
        hidden: Size of the state.
        layers: Number of LSTM layers.
        bidirectional: Whether each layer also reads backwards; the mean over the tokens is then
            what goes to the logits.
        dropout: Between the layers.
        num_classes: Number of logits; None: one per token.
        kind: A key of `KINDS`.

    Raises:
        ValueError: No recurrence of that name.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int = 16,
        hidden: int = 32,
        layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        num_classes: int | None = None,
        kind: str = "lstm",
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: expected one of {', '.join(sorted(KINDS))}.")
        self.embed = nn.Embedding(vocabulary, width)
        self.recurrence = KINDS[kind](
            width,
            hidden,
            layers,
            batch_first=True,
            bidirectional=bidirectional,
            dropout=dropout,
        )
        size = 2 * hidden if bidirectional else hidden
        self.head = nn.Linear(size, vocabulary if num_classes is None else num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, num_classes] of token numbers ``x`` [batch, tokens]."""
        hidden, _ = self.recurrence(self.embed(x))
        read = hidden.mean(1) if self.recurrence.bidirectional else hidden[:, -1]
        logits: Tensor = self.head(read)
        return logits


def recipe(
    seed: int = 0,
    batch_size: int = 32,
    dtype: str = "float32",
    optimizer: str = "adamw",
    rho: float = 0.05,
    lr: float | None = None,
    context: int = 8,
    width: int = 16,
    hidden: int = 32,
    layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    kind: str = "lstm",
    num_batches: int = 8,
) -> tuple[sx.TrainStep, list[tuple[Tensor, Tensor]]]:
    """The SAM step of an `LSTMClassifier` on the text of the Python language reference.

    Args:
        seed: Of the initial weights, of the choice of passages and of the random numbers.
        batch_size: Passages in a batch.
        dtype: ``float32`` or ``float64``, of the weights.
        optimizer: A key of `models.optimizers.BASE_OPTIMIZERS`.
        rho: Radius of the perturbation.
        lr: Learning rate; None takes the default of the base optimizer.
        context: Characters of a passage.
        width: Size of a token's vector.
        hidden: Size of the state.
        layers: Number of LSTM layers.
        bidirectional: Whether each layer also reads backwards.
        dropout: Between the layers.
        kind: A key of `KINDS`.
        num_batches: How many batches to return.

    Returns:
        The step, and batches (x, y) of tensors: int64 [batch, context] and int64 [batch].
    """
    from models.optimizers import cross_entropy_step

    text, vocabulary = characters()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LSTMClassifier(vocabulary, width, hidden, layers, bidirectional, dropout, kind=kind)
        step = cross_entropy_step(model.to(getattr(torch, dtype)), optimizer, rho, lr)
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(num_batches):
        starts = rng.integers(len(text) - context, size=batch_size)
        passages = torch.from_numpy(np.stack([text[i : i + context + 1] for i in starts]))
        batches.append((passages[:, :-1].clone(), passages[:, -1].clone()))
    return step, batches
