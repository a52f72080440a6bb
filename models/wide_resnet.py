"""Wide residual networks, WRN-depth-width, as used in the SAM paper.

Source: S. Zagoruyko, N. Komodakis, "Wide Residual Networks", BMVC 2016,
https://arxiv.org/abs/1605.07146, table 1 (pre-activation blocks of two 3x3 convolutions).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import sam_export as sx


class WideBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv, added to its input.

    Where the number of channels changes, the shortcut is a 1x1 convolution of the input after its
    first BN-ReLU, as in the authors' code; elsewhere it is the input itself.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Of the first convolution and of the shortcut.
        dropout: Probability of dropping a value between the convolutions; 0 leaves the layer out.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_channels, h, w] -> [batch, out_channels, h / stride, w / stride]."""
        active = self.bn1(x).relu()
        residual = x if self.shortcut is None else self.shortcut(active)
        out = self.bn2(self.conv1(active)).relu()
        if self.dropout is not None:
            out = self.dropout(out)
        total: Tensor = residual + self.conv2(out)
        return total


class WideResNet(nn.Module):
    """WRN-``depth``-``width``: three groups of `WideBlock` with 16k, 32k and 64k channels.

    Args:
        depth: Number of layers, 6n + 4 for n blocks per group.
        width: The factor k.
        in_channels: Channels of the images.
        num_classes: Number of logits.
        dropout: Of each block.

    Raises:
        ValueError: ``depth`` is not 6n + 4 with n >= 1.
    """

    def __init__(
        self,
        depth: int = 16,
        width: int = 4,
        in_channels: int = 3,
        num_classes: int = 10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 != 0:
            raise ValueError(f"WideResNet(depth={depth}): expected 6n + 4 (10, 16, 22, 28, ...).")
        blocks_per_group = (depth - 4) // 6
        channels = 16
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for out_channels, first_stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for index in range(blocks_per_group):
                stride = first_stride if index == 0 else 1
                blocks.append(WideBlock(channels, out_channels, stride, dropout))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """He initialisation over the fan-out and a zero bias, as in the authors' code."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * math.prod(module.kernel_size)
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, num_classes] of ``x`` [batch, in_channels, h, w]; h, w multiples of 4."""
        x = self.bn(self.blocks(self.conv(x))).relu()
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def recipe(
    seed: int = 0,
    batch_size: int = 32,
    dtype: str = "float32",
    optimizer: str = "nesterov",
    rho: float = 0.05,
    lr: float | None = None,
    depth: int = 16,
    width: int = 4,
    image_size: int = 32,
    in_channels: int = 3,
    num_classes: int = 10,
    dropout: float = 0.0,
    num_batches: int = 8,
) -> tuple[sx.TrainStep, list[tuple[Tensor, Tensor]]]:
    """The SAM step of a `WideResNet` on seeded random images (CIFAR would need a download).

    Args:
        seed: Of the initial weights, of the images and of the random numbers.
        batch_size: Examples in a batch.
        dtype: ``float32`` or ``float64``, of weights and images.
        optimizer: A key of `models.optimizers.BASE_OPTIMIZERS` (the paper's is Nesterov's).
        rho: Radius of the perturbation.
        lr: Learning rate; None takes the default of the base optimizer.
        depth: Number of layers, 6n + 4.
        width: The paper's factor k.
        image_size: Height and width of the images, a multiple of 4.
        in_channels: Channels of the images.
        num_classes: Number of classes.
        dropout: Of each block.
        num_batches: How many batches to return.

    Returns:
        The step, and batches (x, y) of tensors.
    """
    from models.optimizers import cross_entropy_step

    float_type = getattr(torch, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WideResNet(depth, width, in_channels, num_classes, dropout).to(float_type)
        batches = [
            (
                torch.randn(batch_size, in_channels, image_size, image_size, dtype=float_type),
                torch.randint(num_classes, (batch_size,)),
            )
            for _ in range(num_batches)
        ]
        step = cross_entropy_step(model, optimizer, rho, lr)
    return step, batches
