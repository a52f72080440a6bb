"""A small BERT: it fills in the hidden characters of passages of different lengths.

Source: J. Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", 2019, https://arxiv.org/abs/1810.04805, sections 3 and 3.1 (masked language model).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.gpt import characters

if TYPE_CHECKING:
    import sam_export as sx

IGNORED = -100
"""Target of a token that is not to be guessed; `torch.nn.functional.cross_entropy` skips it."""


class MaskedAttention(nn.Module):
    """Multi-head self-attention in which nobody sees the padding.

    Args:
        width: Size of a token's vector.
        heads: Number of heads; it divides ``width``.
        dropout: Of the attention weights.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[batch, tokens, width] -> the same; ``mask`` [batch, tokens] is true for real tokens."""
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        p = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :], dropout_p=p)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class EncoderBlock(nn.Module):
    """``norm(x + attention(x))``, then ``norm(x + mlp(x))``.

    Args:
        width: Size of a token's vector.
        heads: Number of heads.
        dropout: Of attention weights and of both branches' outputs.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = MaskedAttention(width, heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[batch, tokens, width] -> the same; ``mask`` [batch, tokens] is true for real tokens."""
        x = self.norm1(x + self.drop(self.attention(x, mask)))
        result: Tensor = self.norm2(x + self.drop(self.mlp(x)))
        return result


class BERT(nn.Module):
    """Token and position embeddings, blocks, a head that shares the embedding's weights.

    Args:
        vocabulary: Number of different tokens, with the two for hidden and padding.
        context: Most tokens of a sequence.
        width: Size of a token's vector.
        depth: Number of blocks.
        heads: Attention heads of a block.
        dropout: Of embeddings, attention weights and branches.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int = 32,
        width: int = 32,
        depth: int = 2,
        heads: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=vocabulary - 1)
        self.positions = nn.Embedding(context, width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, dropout) for _ in range(depth))
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Logits [batch, tokens, vocabulary].

        Args:
            x: Token numbers, int64 [batch, tokens].
            mask: True for real tokens, false for padding, bool [batch, tokens].
        """
        positions = self.positions(torch.arange(x.shape[1], device=x.device))
        hidden = self.drop(self.norm(self.tokens(x) + positions))
        for block in self.blocks:
            hidden = block(hidden, mask)
        return F.linear(self.head(hidden), self.tokens.weight, self.bias)


def hidden_token_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens that are to be guessed.

    Args:
        logits: [batch, tokens, vocabulary].
        y: int64 [batch, tokens], `IGNORED` where nothing is to be guessed.
    """
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED)


def recipe(
    seed: int = 0,
    batch_size: int = 12,
    dtype: str = "float32",
    optimizer: str = "adamw",
    rho: float = 0.05,
    lr: float | None = None,
    context: int = 32,
    width: int = 32,
    depth: int = 2,
    heads: int = 2,
    dropout: float = 0.1,
    num_batches: int = 8,
) -> tuple[sx.TrainStep, list[tuple[Tensor, Tensor, Tensor]]]:
    """The SAM step of a `BERT` on the text of the Python language reference.

    Args:
        seed: Of the initial weights, of the passages, of what is hidden and of random numbers.
        batch_size: Passages in a batch.
        dtype: ``float32`` or ``float64``, of the weights.
        optimizer: A key of `models.optimizers.BASE_OPTIMIZERS`.
        rho: Radius of the perturbation.
        lr: Learning rate; None takes the default of the base optimizer.
        context: Characters of the longest passage; the shortest has half as many.
        width: Size of a token's vector.
        depth: Number of blocks.
        heads: Attention heads of a block.
        dropout: Of embeddings, attention weights and branches.
        num_batches: How many batches to return.

    Returns:
        The step, and batches (x, mask, y) of tensors: int64, bool and int64 [batch, context].
    """
    from models.optimizers import sam_step

    text, count = characters()
    hidden, padding = count, count + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BERT(count + 2, context, width, depth, heads, dropout)
        step = sam_step(model.to(getattr(torch, dtype)), hidden_token_loss, optimizer, rho, lr)
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(num_batches):
        starts = rng.integers(len(text) - context, size=batch_size)
        lengths = rng.integers(context // 2, context + 1, size=(batch_size, 1))
        passages = np.stack([text[start : start + context] for start in starts])
        mask = np.arange(context) < lengths
        guessed = (rng.random(mask.shape) < 0.15) | (np.arange(context) == 0)
        guessed &= mask
        x = np.where(mask, np.where(guessed, hidden, passages), padding)
        y = np.where(guessed, passages, IGNORED)
        batches.append(tuple(torch.from_numpy(part) for part in (x, mask, y)))
    return step, batches
