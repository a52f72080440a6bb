"""A small ConvNeXt: depthwise convolution, LayerNorm over channels, an MLP, layer scale.

Source: Z. Liu et al., "A ConvNet for the 2020s", 2022, https://arxiv.org/abs/2201.03545, figure 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.digits import iterate, load_digits
from models.transformer import StochasticDepth

if TYPE_CHECKING:
    import sam_export as sx


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of a [batch, channels, h, w] image."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, h, w] -> the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """``x + scale * mlp(norm(depthwise(x)))``, the MLP on channels-last pixels.

    Args:
        channels: Channels of ``x``.
        kernel: Of the depthwise convolution.
        layer_scale: First value of ``scale``.
        drop_path: Probability of dropping the branch (stochastic depth).
    """

    def __init__(self, channels: int, kernel: int, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, 4 * channels)
        self.reduce = nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), layer_scale))
        self.path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, h, w] -> the same."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.reduce(nn.functional.gelu(self.expand(y)))
        return x + self.path(y.permute(0, 3, 1, 2))


class ConvNeXt(nn.Module):
    """A patch stem, stages of blocks with a 2x2 convolution of stride 2 between, a linear head.

    Args:
        depths: Blocks of each stage.
        channels: Of the first stage; each later one doubles.
        kernel: Of the depthwise convolutions, odd.
        patch: Height and width of the stem's patches.
        layer_scale: First value of each block's scale; the paper's is 1e-6.
        drop_path: Stochastic depth of the last block; it grows linearly from 0.
        in_channels: Channels of the images.
        num_classes: Number of logits.
    """

    def __init__(
        self,
        depths: Sequence[int] = (1, 1),
        channels: int = 16,
        kernel: int = 7,
        patch: int = 1,
        layer_scale: float = 1e-2,
        drop_path: float = 0.1,
        in_channels: int = 1,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, channels, patch, stride=patch),
            ChannelNorm(channels, eps=1e-6),
        ]
        place, last = 0, max(sum(depths) - 1, 1)
        for stage, depth in enumerate(depths):
            if stage > 0:
                layers += [
                    ChannelNorm(channels, eps=1e-6),
                    nn.Conv2d(channels, 2 * channels, 2, stride=2),
                ]
                channels *= 2
            for _ in range(depth):
                layers.append(
                    ConvNeXtBlock(channels, kernel, layer_scale, drop_path * place / last)
                )
                place += 1
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, num_classes] of images ``x`` [batch, in_channels, height, width]."""
        logits: Tensor = self.head(self.norm(self.layers(x).mean((2, 3))))
        return logits


def recipe(
    seed: int = 0,
    batch_size: int = 32,
    dtype: str = "float32",
    optimizer: str = "adamw",
    rho: float = 0.05,
    lr: float | None = None,
    depths: Sequence[int] = (1, 1),
    channels: int = 16,
    kernel: int = 7,
    drop_path: float = 0.1,
    num_batches: int = 8,
) -> tuple[sx.TrainStep, list[tuple[Tensor, Tensor]]]:
    """The SAM step of a `ConvNeXt` on real handwritten digits.

    Args:
        seed: Of the initial weights, of the order of the data and of the random numbers.
        batch_size: Examples in a batch.
        dtype: ``float32`` or ``float64``, of weights and images.
        optimizer: A key of `models.optimizers.BASE_OPTIMIZERS`.
        rho: Radius of the perturbation.
        lr: Learning rate; None takes the default of the base optimizer.
        depths: Blocks of each stage.
        channels: Of the first stage.
        kernel: Of the depthwise convolutions.
        drop_path: Stochastic depth of the last block.
        num_batches: How many batches to return at most.

    Returns:
        The step, and batches (x, y) of tensors.
    """
    from models.optimizers import cross_entropy_step

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ConvNeXt(depths, channels, kernel, drop_path=drop_path)
        step = cross_entropy_step(model.to(getattr(torch, dtype)), optimizer, rho, lr)
    digits = load_digits(seed, dtype)
    batches = [
        (torch.from_numpy(x), torch.from_numpy(y))
        for x, y in islice(iterate(digits.train_x, digits.train_y, batch_size), num_batches)
    ]
    return step, batches
