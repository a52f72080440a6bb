"""A small Swin transformer: attention inside windows that are shifted in every other block.

Source: Z. Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
2021, https://arxiv.org/abs/2103.14030, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.digits import iterate, load_digits

if TYPE_CHECKING:
    import sam_export as sx


def windows_of(x: Tensor, window: int) -> Tensor:
    """[batch, h, w, width] -> [batch, windows, window * window, width]."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def image_of(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """The inverse of `windows_of`, for an image of this size."""
    x = x.unflatten(2, (window, window)).unflatten(1, (height // window, width // window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class WindowAttention(nn.Module):
    """Multi-head attention of the tokens of a window, with a learned bias per relative position.

    In a shifted window, tokens that were no neighbours before the roll do not see each other.

    Args:
        width: Size of a token's vector.
        heads: Number of heads; it divides ``width``.
        size: Height and width of the image.
        window: Height and width of a window; it divides ``size``.
        shift: By how much the windows are moved; 0: not at all.
    """

    def __init__(self, width: int, heads: int, size: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.bias = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))
        row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        row, column = row.flatten(), column.flatten()
        places = (row[:, None] - row + window - 1) * (2 * window - 1)
        places = places + column[:, None] - column + window - 1
        self.register_buffer("places", places.flatten(), persistent=False)
        # The three strips of an axis that a roll brings together; a window spans one or two.
        strip = torch.zeros(size, dtype=torch.int64)
        strip[size - window :] = 1
        strip[size - shift :] = 2 if shift else 1
        region = (3 * strip[:, None] + strip)[None, :, :, None]
        region = windows_of(region, window)[0, :, :, 0]  # [windows, tokens]
        apart = region[:, :, None] != region[:, None, :]
        self.register_buffer("apart", apart[:, None] if shift else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, h, w, width] -> the same."""
        height, width = x.shape[1], x.shape[2]
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        tokens = windows_of(x, self.window)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(2, 3)
            for part in self.qkv(tokens).chunk(3, dim=-1)
        )  # [batch, windows, heads, tokens, width / heads]
        count = self.window**2
        bias = self.bias[self.places].view(count, count, self.heads).permute(2, 0, 1)
        if self.shift:
            bias = bias.masked_fill(self.apart, float("-inf"))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = image_of(self.out(mixed.transpose(2, 3).flatten(3)), self.window, height, width)
        return torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x


class SwinBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Args:
        width: Size of a token's vector.
        heads: Number of heads.
        size: Height and width of the image.
        window: Height and width of a window.
        shift: By how much the windows are moved.
        dropout: Of both branches' outputs.
    """

    def __init__(
        self, width: int, heads: int, size: int, window: int, shift: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, size, window, shift)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, h, w, width] -> the same."""
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Each 2x2 square of tokens becomes one, of twice the width.

    Args:
        width: Size of a token's vector before.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduce = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, h, w, width] -> [batch, h / 2, w / 2, 2 * width]."""
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        merged: Tensor = self.reduce(self.norm(torch.cat(parts, -1)))
        return merged


class Swin(nn.Module):
    """Patches as tokens, stages of blocks with patch merging between, the mean token to the logits.

    Args:
        image_size: Height and width of the images.
        patch: Height and width of a patch.
        window: Height and width of a window; a stage as small as that has no shift.
        depths: Blocks of each stage.
        width: Size of a token's vector in the first stage; each later one doubles.
        heads: Heads in the first stage; each later one doubles.
        dropout: Of the branches' outputs.
        in_channels: Channels of the images.
        num_classes: Number of logits.

    Raises:
        ValueError: The windows do not cover the image.
    """

    def __init__(
        self,
        image_size: int = 8,
        patch: int = 1,
        window: int = 4,
        depths: Sequence[int] = (2, 1),
        width: int = 16,
        heads: int = 2,
        dropout: float = 0.1,
        in_channels: int = 1,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        size = image_size // patch
        self.embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        layers: list[nn.Module] = [nn.LayerNorm(width)]
        for stage, depth in enumerate(depths):
            if stage > 0:
                layers.append(PatchMerging(width))
                size, width, heads = size // 2, 2 * width, 2 * heads
            if size % window:
                raise ValueError(f"window={window} does not divide stage {stage}'s size {size}.")
            for index in range(depth):
                shift = window // 2 if index % 2 and size > window else 0
                layers.append(SwinBlock(width, heads, size, window, shift, dropout))
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, num_classes] of images ``x`` [batch, in_channels, height, width]."""
        tokens = self.layers(self.embed(x).permute(0, 2, 3, 1))
        logits: Tensor = self.head(self.norm(tokens).mean((1, 2)))
        return logits


def recipe(
    seed: int = 0,
    batch_size: int = 32,
    dtype: str = "float32",
    optimizer: str = "adamw",
    rho: float = 0.05,
    lr: float | None = None,
    depths: Sequence[int] = (2, 1),
    width: int = 16,
    heads: int = 2,
    dropout: float = 0.1,
    num_batches: int = 8,
) -> tuple[sx.TrainStep, list[tuple[Tensor, Tensor]]]:
    """The SAM step of a `Swin` on real handwritten digits.

    Args:
        seed: Of the initial weights, of the order of the data and of the random numbers.
        batch_size: Examples in a batch.
        dtype: ``float32`` or ``float64``, of weights and images.
        optimizer: A key of `models.optimizers.BASE_OPTIMIZERS`.
        rho: Radius of the perturbation.
        lr: Learning rate; None takes the default of the base optimizer.
        depths: Blocks of each stage.
        width: Size of a token's vector in the first stage.
        heads: Heads in the first stage.
        dropout: Of the branches' outputs.
        num_batches: How many batches to return at most.

    Returns:
        The step, and batches (x, y) of tensors.
    """
    from models.optimizers import cross_entropy_step

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Swin(depths=depths, width=width, heads=heads, dropout=dropout)
        step = cross_entropy_step(model.to(getattr(torch, dtype)), optimizer, rho, lr)
    digits = load_digits(seed, dtype)
    batches = [
        (torch.from_numpy(x), torch.from_numpy(y))
        for x, y in islice(iterate(digits.train_x, digits.train_y, batch_size), num_batches)
    ]
    return step, batches
