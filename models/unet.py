"""A small U-Net: which digit does each pixel of ink belong to?

Source: O. Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation",
2015, https://arxiv.org/abs/1505.04597, figure 1 (with padding and BatchNorm, as usual since).
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.digits import iterate, load_digits

if TYPE_CHECKING:
    import sam_export as sx

PAPER = 10
"""The class of a pixel without ink."""

_INK = 0.5


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions with BatchNorm and ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the result.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )


class UNet(nn.Module):
    """Down by max pooling, up again with what was seen on the way down beside it.

    Args:
        channels: Channels at full size; each level below has twice as many.
        levels: How often the image is halved.
        transposed: Whether a transposed convolution enlarges the image; otherwise bilinear
            interpolation and a 1x1 convolution.
        in_channels: Channels of the images.
        num_classes: Number of logits of a pixel.
    """

    def __init__(
        self,
        channels: int = 8,
        levels: int = 2,
        transposed: bool = False,
        in_channels: int = 1,
        num_classes: int = PAPER + 1,
    ) -> None:
        super().__init__()
        self.down = nn.ModuleList([DoubleConv(in_channels, channels)])
        self.up = nn.ModuleList()
        self.merge = nn.ModuleList()
        for level in range(levels):
            narrow, wide = channels * 2**level, channels * 2 ** (level + 1)
            self.down.append(DoubleConv(narrow, wide))
            enlarge: nn.Module = nn.ConvTranspose2d(wide, narrow, 2, stride=2)
            if not transposed:
                enlarge = nn.Sequential(
                    nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
                    nn.Conv2d(wide, narrow, 1),
                )
            self.up.append(enlarge)
            self.merge.append(DoubleConv(2 * narrow, narrow))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, num_classes, h, w] of images ``x`` [batch, in_channels, h, w]."""
        seen = [self.down[0](x)]
        for block in list(self.down)[1:]:
            seen.append(block(self.pool(seen[-1])))
        x = seen.pop()
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            x = merge(torch.cat([seen.pop(), up(x)], 1))
        logits: Tensor = self.head(x)
        return logits


def recipe(
    seed: int = 0,
    batch_size: int = 32,
    dtype: str = "float32",
    optimizer: str = "adamw",
    rho: float = 0.05,
    lr: float | None = None,
    channels: int = 8,
    levels: int = 2,
    transposed: bool = False,
    num_batches: int = 8,
) -> tuple[sx.TrainStep, list[tuple[Tensor, Tensor]]]:
    """The SAM step of a `UNet` that names the digit, or `PAPER`, of every pixel.

    Args:
        seed: Of the initial weights and of the order of the data.
        batch_size: Examples in a batch.
        dtype: ``float32`` or ``float64``, of weights and images.
        optimizer: A key of `models.optimizers.BASE_OPTIMIZERS`.
        rho: Radius of the perturbation.
        lr: Learning rate; None takes the default of the base optimizer.
        channels: Channels at full size.
        levels: How often the image is halved.
        transposed: Whether transposed convolutions enlarge the image.
        num_batches: How many batches to return at most.

    Returns:
        The step, and batches (x, y) of tensors; y is int64 [batch, 8, 8].
    """
    from models.optimizers import cross_entropy_step

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet(channels, levels, transposed).to(getattr(torch, dtype))
        step = cross_entropy_step(model, optimizer, rho, lr)
    digits = load_digits(seed, dtype)
    batches = []
    for images, labels in islice(iterate(digits.train_x, digits.train_y, batch_size), num_batches):
        x, y = torch.from_numpy(images), torch.from_numpy(labels)
        batches.append((x, torch.where(x[:, 0] > _INK, y[:, None, None], PAPER)))
    return step, batches
