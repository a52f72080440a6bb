"""A small vision transformer for the 8x8 digits.

Source: A. Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021,
https://arxiv.org/abs/2010.11929; mean pooling in place of a class token (appendix D.3).
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.digits import iterate, load_digits
from models.transformer import Block

if TYPE_CHECKING:
    import sam_export as sx


class ViT(nn.Module):
    """Patches as tokens, transformer blocks, the mean token to the logits.

    Args:
        image_size: Height and width of the images.
        patch: Height and width of a patch; it divides ``image_size``.
        in_channels: Channels of the images.
        width: Size of a token's vector.
        depth: Number of blocks.
        heads: Attention heads of a block.
        dropout: Of tokens, attention weights and branches.
        drop_path: Stochastic depth of the last block; it grows linearly from 0.
        num_classes: Number of logits.
    """

    def __init__(
        self,
        image_size: int = 8,
        patch: int = 2,
        in_channels: int = 1,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.1,
        drop_path: float = 0.1,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.patch = patch
        tokens = (image_size // patch) ** 2
        self.embed = nn.Linear(in_channels * patch * patch, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(
                Block(width, heads, dropout, drop_path * index / max(depth - 1, 1), causal=False)
                for index in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, num_classes] of images ``x`` [batch, channels, height, width]."""
        p = self.patch
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [batch, channels, rows, p, columns, p]
        tokens = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        hidden = self.drop(self.embed(tokens) + self.position)
        logits: Tensor = self.head(self.norm(self.blocks(hidden)).mean(1))
        return logits


def recipe(
    seed: int = 0,
    batch_size: int = 32,
    dtype: str = "float32",
    optimizer: str = "adamw",
    rho: float = 0.05,
    lr: float | None = None,
    width: int = 64,
    depth: int = 4,
    dropout: float = 0.1,
    drop_path: float = 0.1,
    num_batches: int = 8,
) -> tuple[sx.TrainStep, list[tuple[Tensor, Tensor]]]:
    """The SAM step of a `ViT` on real handwritten digits.

    Args:
        seed: Of the initial weights, of the order of the data and of the random numbers.
        batch_size: Examples in a batch.
        dtype: ``float32`` or ``float64``, of weights and images.
        optimizer: A key of `models.optimizers.BASE_OPTIMIZERS`.
        rho: Radius of the perturbation.
        lr: Learning rate; None takes the default of the base optimizer.
        width: Size of a token's vector.
        depth: Number of blocks.
        dropout: Of tokens, attention weights and branches.
        drop_path: Stochastic depth of the last block.
        num_batches: How many batches to return at most.

    Returns:
        The step, and batches (x, y) of tensors.
    """
    from models.optimizers import cross_entropy_step

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViT(width=width, depth=depth, dropout=dropout, drop_path=drop_path)
        step = cross_entropy_step(model.to(getattr(torch, dtype)), optimizer, rho, lr)
    digits = load_digits(seed, dtype)
    batches = [
        (torch.from_numpy(x), torch.from_numpy(y))
        for x, y in islice(iterate(digits.train_x, digits.train_y, batch_size), num_batches)
    ]
    return step, batches
