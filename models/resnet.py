"""ResNet and ResNeXt: residual bottlenecks, with groups if wanted; the recipe's is a small one.

Sources: K. He et al., "Deep Residual Learning for Image Recognition", 2016,
https://arxiv.org/abs/1512.03385, table 1 (the stride is on the 3x3 convolution, as usual since);
S. Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", 2017,
https://arxiv.org/abs/1611.05431, figure 3c.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.digits import iterate, load_digits

if TYPE_CHECKING:
    import sam_export as sx


class Bottleneck(nn.Module):
    """``relu(x + expand(relu(conv3x3(relu(reduce(x))))))``, BatchNorm after each convolution.

    Args:
        in_channels: Channels of the input.
        width: Channels of the 3x3 convolution.
        out_channels: Channels of the result.
        stride: Of the 3x3 convolution.
        groups: Of the 3x3 convolution.
    """

    def __init__(
        self, in_channels: int, width: int, out_channels: int, stride: int, groups: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_channels, h, w] -> [batch, out_channels, h / stride, w / stride]."""
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(y))
        result: Tensor = (y + self.shortcut(x)).relu()
        return result


class ResNet(nn.Module):
    """A stem, stages of bottlenecks that halve the image from the second one on, a linear head.

    Args:
        depths: Blocks of each stage; ``(3, 4, 6, 3)`` is ResNet-50.
        channels: Of the stem; the first stage has four times as many, each later one doubles.
        groups: Of the 3x3 convolutions; 1 is ResNet, 32 with ``group_width=4`` ResNeXt-50.
        group_width: Channels of a group in the first stage; None: ``channels / groups``.
        in_channels: Channels of the images.
        num_classes: Number of logits.
        large: Whether the stem is a 7x7 convolution of stride 2 and max pooling, for images of 64
            pixels and more; otherwise a 3x3 convolution.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        channels: int = 64,
        groups: int = 1,
        group_width: int | None = None,
        in_channels: int = 3,
        num_classes: int = 1000,
        large: bool = True,
    ) -> None:
        super().__init__()
        width = groups * (channels // groups if group_width is None else group_width)
        if width % groups or not width:
            raise ValueError(f"channels={channels} cannot be divided into groups={groups}.")
        stem = (
            (nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False), True)
            if large
            else (nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), False)
        )
        self.conv, pools = stem
        self.bn = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if pools else nn.Identity()
        blocks: list[nn.Module] = []
        before, after = channels, 4 * channels
        for stage, depth in enumerate(depths):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Bottleneck(before, width, after, stride, groups))
                before = after
            width, after = 2 * width, 2 * after
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, num_classes] of images ``x`` [batch, in_channels, height, width]."""
        x = self.pool(self.bn(self.conv(x)).relu())
        logits: Tensor = self.fc(self.blocks(x).mean((2, 3)))
        return logits


def recipe(
    seed: int = 0,
    batch_size: int = 32,
    dtype: str = "float32",
    optimizer: str = "sgd",
    rho: float = 0.05,
    lr: float | None = None,
    depths: Sequence[int] = (1, 1, 1),
    channels: int = 16,
    groups: int = 4,
    group_width: int | None = None,
    num_batches: int = 8,
) -> tuple[sx.TrainStep, list[tuple[Tensor, Tensor]]]:
    """The SAM step of a small `ResNet` on real handwritten digits.

    Args:
        seed: Of the initial weights and of the order of the data.
        batch_size: Examples in a batch.
        dtype: ``float32`` or ``float64``, of weights and images.
        optimizer: A key of `models.optimizers.BASE_OPTIMIZERS`.
        rho: Radius of the perturbation.
        lr: Learning rate; None takes the default of the base optimizer.
        depths: Blocks of each stage.
        channels: Of the stem.
        groups: Of the 3x3 convolutions.
        group_width: Channels of a group in the first stage.
        num_batches: How many batches to return at most.

    Returns:
        The step, and batches (x, y) of tensors.
    """
    from models.optimizers import cross_entropy_step

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet(depths, channels, groups, group_width, 1, 10, large=False)
        step = cross_entropy_step(model.to(getattr(torch, dtype)), optimizer, rho, lr)
    digits = load_digits(seed, dtype)
    batches = [
        (torch.from_numpy(x), torch.from_numpy(y))
        for x, y in islice(iterate(digits.train_x, digits.train_y, batch_size), num_batches)
    ]
    return step, batches
