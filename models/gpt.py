"""A small GPT over characters, on the text of the Python language reference.

Source: A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; sizes as in
nanoGPT's example for a CPU (4 layers, 4 heads, width 128, context 64).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.transformer import Block

if TYPE_CHECKING:
    import sam_export as sx


class GPT(nn.Module):
    """Token and position embeddings, causal blocks, logits with the embedding's own weights.

    Args:
        vocabulary: Number of different tokens.
        context: Most tokens of a sequence.
        width: Size of a token's vector.
        depth: Number of blocks.
        heads: Attention heads of a block.
        dropout: Of embeddings, attention weights and branches.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int = 64,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(Block(width, heads, dropout, drop_path=0.0, causal=True) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, tokens, vocabulary] of token numbers ``x`` [batch, tokens]."""
        positions = self.positions(torch.arange(x.shape[1], device=x.device))
        hidden = self.norm(self.blocks(self.drop(self.tokens(x) + positions)))
        return nn.functional.linear(hidden, self.tokens.weight)


def next_token_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of logits [batch, tokens, vocabulary] for tokens ``y`` [batch, tokens]."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def characters() -> tuple[NDArray[np.int64], int]:
    """The text as numbers of characters, and how many different ones there are."""
    from pydoc_data.topics import topics  # comes with Python

    text = "\n".join(topics[name] for name in sorted(topics))
    symbols, numbers = np.unique(np.array(list(text)), return_inverse=True)
    return numbers.astype(np.int64), len(symbols)


def recipe(
    seed: int = 0,
    batch_size: int = 12,
    dtype: str = "float32",
    optimizer: str = "adamw",
    rho: float = 0.05,
    lr: float | None = None,
    context: int = 64,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    dropout: float = 0.1,
    num_batches: int = 8,
) -> tuple[sx.TrainStep, list[tuple[Tensor, Tensor]]]:
    """The SAM step of a `GPT` that predicts the next character of Python's reference.

    Args:
        seed: Of the initial weights, of the choice of passages and of the random numbers.
        batch_size: Passages in a batch.
        dtype: ``float32`` or ``float64``, of the weights.
        optimizer: A key of `models.optimizers.BASE_OPTIMIZERS`.
        rho: Radius of the perturbation.
        lr: Learning rate; None takes the default of the base optimizer.
        context: Characters of a passage.
        width: Size of a token's vector.
        depth: Number of blocks.
        heads: Attention heads of a block.
        dropout: Of embeddings, attention weights and branches.
        num_batches: How many batches to return.

    Returns:
        The step, and batches (x, y) of tensors, int64 [batch, context] each.
    """
    from models.optimizers import sam_step

    text, vocabulary = characters()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(vocabulary, context, width, depth, heads, dropout)
        step = sam_step(model.to(getattr(torch, dtype)), next_token_loss, optimizer, rho, lr)
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(num_batches):
        starts = rng.integers(len(text) - context, size=batch_size)
        passages = torch.from_numpy(np.stack([text[i : i + context + 1] for i in starts]))
        batches.append((passages[:, :-1].clone(), passages[:, 1:].clone()))
    return step, batches
