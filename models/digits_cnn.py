"""A small convolutional network for 8x8 digits: stride, BatchNorm, max pooling, a linear head."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.digits import iterate, load_digits

if TYPE_CHECKING:
    import sam_export as sx


class DigitsCNN(nn.Module):
    """Three 3x3 convolutions with BatchNorm and ReLU, max pooling, one linear layer.

    One image: [1, 8, 8] -> [c, 8, 8] -> [2c, 4, 4] -> [2c, 4, 4] -> [2c, 2, 2] -> logits.

    Args:
        channels: Channels ``c`` of the first convolution; the others have twice as many.
        num_classes: Number of logits.
        dropout: Of the values that go into the linear layer; 0 leaves the layer out.
    """

    def __init__(self, channels: int = 16, num_classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        wide = 2 * channels
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, wide, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.fc = nn.Linear(wide * 2 * 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, num_classes] of ``x`` [batch, 1, 8, 8]."""
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        x = self.pool(x).flatten(1)
        if self.dropout is not None:
            x = self.dropout(x)
        logits: Tensor = self.fc(x)
        return logits


def recipe(
    seed: int = 0,
    batch_size: int = 32,
    dtype: str = "float32",
    optimizer: str = "sgd",
    rho: float = 0.05,
    lr: float | None = None,
    channels: int = 16,
    dropout: float = 0.0,
    num_batches: int = 8,
) -> tuple[sx.TrainStep, list[tuple[Tensor, Tensor]]]:
    """The SAM step of a `DigitsCNN` on real handwritten digits.

    Args:
        seed: Of the initial weights, of the order of the data and of the random numbers.
        batch_size: Examples in a batch.
        dtype: ``float32`` or ``float64``, of weights and images.
        optimizer: A key of `models.optimizers.BASE_OPTIMIZERS`.
        rho: Radius of the perturbation.
        lr: Learning rate; None takes the default of the base optimizer.
        channels: Channels of the first convolution.
        dropout: Before the linear layer.
        num_batches: How many batches to return at most.

    Returns:
        The step, and batches (x, y) of tensors.
    """
    from models.optimizers import cross_entropy_step

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsCNN(channels, dropout=dropout).to(getattr(torch, dtype))
        step = cross_entropy_step(model, optimizer, rho, lr)
    digits = load_digits(seed, dtype)
    batches = [
        (torch.from_numpy(x), torch.from_numpy(y))
        for x, y in islice(iterate(digits.train_x, digits.train_y, batch_size), num_batches)
    ]
    return step, batches
