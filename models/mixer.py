"""A small MLP-Mixer for the 8x8 digits: MLPs across patches and MLPs across channels, in turn.

Source: I. Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", 2021,
https://arxiv.org/abs/2105.01601, figure 1.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.digits import iterate, load_digits

if TYPE_CHECKING:
    import sam_export as sx


def _mlp(size: int, hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(size, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, size)
    )


class MixerBlock(nn.Module):
    """``x + mlp(norm(x)^T)^T`` across tokens, then ``x + mlp(norm(x))`` across channels.

    Args:
        tokens: Number of tokens.
        width: Size of a token's vector.
        dropout: Inside both MLPs.
    """

    def __init__(self, tokens: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across_tokens = _mlp(tokens, 2 * tokens, dropout)
        self.across_channels = _mlp(width, 4 * width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] -> the same."""
        x = x + self.across_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        result: Tensor = x + self.across_channels(self.norm2(x))
        return result


class Mixer(nn.Module):
    """Patches as tokens by a convolution, mixer blocks, the mean token to the logits.

    Args:
        image_size: Height and width of the images.
        patch: Height and width of a patch; it divides ``image_size``.
        in_channels: Channels of the images.
        width: Size of a token's vector.
        depth: Number of blocks.
        dropout: Inside the MLPs.
        num_classes: Number of logits.
    """

    def __init__(
        self,
        image_size: int = 8,
        patch: int = 2,
        in_channels: int = 1,
        width: int = 32,
        depth: int = 2,
        dropout: float = 0.1,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        tokens = (image_size // patch) ** 2
        self.embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(MixerBlock(tokens, width, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, num_classes] of images ``x`` [batch, in_channels, height, width]."""
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


def recipe(
    seed: int = 0,
    batch_size: int = 32,
    dtype: str = "float32",
    optimizer: str = "adamw",
    rho: float = 0.05,
    lr: float | None = None,
    width: int = 32,
    depth: int = 2,
    dropout: float = 0.1,
    num_batches: int = 8,
) -> tuple[sx.TrainStep, list[tuple[Tensor, Tensor]]]:
    """The SAM step of a `Mixer` on real handwritten digits.

    Args:
        seed: Of the initial weights, of the order of the data and of the random numbers.
        batch_size: Examples in a batch.
        dtype: ``float32`` or ``float64``, of weights and images.
        optimizer: A key of `models.optimizers.BASE_OPTIMIZERS`.
        rho: Radius of the perturbation.
        lr: Learning rate; None takes the default of the base optimizer.
        width: Size of a token's vector.
        depth: Number of blocks.
        dropout: Inside the MLPs.
        num_batches: How many batches to return at most.

    Returns:
        The step, and batches (x, y) of tensors.
    """
    from models.optimizers import cross_entropy_step

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Mixer(width=width, depth=depth, dropout=dropout)
        step = cross_entropy_step(model.to(getattr(torch, dtype)), optimizer, rho, lr)
    digits = load_digits(seed, dtype)
    batches = [
        (torch.from_numpy(x), torch.from_numpy(y))
        for x, y in islice(iterate(digits.train_x, digits.train_y, batch_size), num_batches)
    ]
    return step, batches
