"""The pre-norm transformer block that `models.vit` and `models.gpt` share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention with packed projections.

    Args:
        width: Size of a token's vector.
        heads: Number of heads; it divides ``width``.
        dropout: Of the attention weights, and of the output.
        causal: Whether a token sees only itself and those before it.

    Source: A. Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762,
        section 3.2.
    """

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        if width % heads != 0:
            raise ValueError(f"width={width} is not divisible by heads={heads}.")
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] -> the same."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        p = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=self.causal)
        result: Tensor = self.drop(self.out(mixed.transpose(1, 2).flatten(2)))
        return result


class StochasticDepth(nn.Module):
    """Drops a whole residual branch, for each example of a batch by itself.

    ``x * keep / (1 - p)`` in training, ``keep`` being 0 with probability ``p``; else ``x``.

    Source: G. Huang et al., "Deep Networks with Stochastic Depth", 2016,
        https://arxiv.org/abs/1603.09382
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """[batch, ...] -> the same."""
        if not self.training or self.p == 0.0:
            return x
        keep = torch.empty((x.shape[0], *[1] * (x.dim() - 1)), dtype=x.dtype, device=x.device)
        return x * keep.bernoulli_(1.0 - self.p) / (1.0 - self.p)


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, with an MLP four times as wide.

    Args:
        width: Size of a token's vector.
        heads: Number of attention heads.
        dropout: Of attention weights and of both branches' outputs.
        drop_path: Probability of dropping a branch (stochastic depth).
        causal: Whether attention looks back only.
    """

    def __init__(
        self, width: int, heads: int, dropout: float, drop_path: float, causal: bool
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout, causal)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )
        self.path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] -> the same."""
        x = x + self.path(self.attention(self.norm1(x)))
        return x + self.path(self.mlp(self.norm2(x)))
