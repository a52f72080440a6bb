"""A mobile network: inverted residuals, depthwise convolutions, squeeze-and-excitation.

Sources: A. Howard et al., "Searching for MobileNetV3", 2019, https://arxiv.org/abs/1905.02244,
section 5; M. Tan, Q. Le, "EfficientNet", 2019, https://arxiv.org/abs/1905.11946 (with SiLU);
J. Hu et al., "Squeeze-and-Excitation Networks", 2018, https://arxiv.org/abs/1709.01507.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.digits import iterate, load_digits
from models.transformer import StochasticDepth

if TYPE_CHECKING:
    import sam_export as sx

ACTIVATIONS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "hardswish": (nn.Hardswish, nn.Hardsigmoid),
    "silu": (nn.SiLU, nn.Sigmoid),
}
"""Name to activation and gate: MobileNetV3's, EfficientNet's."""


class SqueezeExcite(nn.Module):
    """``x * gate(expand(relu(reduce(mean of x over the image))))``, per channel.

    Args:
        channels: Channels of ``x``.
        reduced: Channels between.
        gate: The gate's module.
    """

    def __init__(self, channels: int, reduced: int, gate: type[nn.Module]) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.expand = nn.Conv2d(reduced, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, h, w] -> the same."""
        result: Tensor = x * self.gate(self.expand(self.reduce(self.pool(x)).relu()))
        return result


class InvertedResidual(nn.Module):
    """Expand by 1x1, depthwise, squeeze-and-excitation, project by 1x1; added to ``x`` if it fits.

    Args:
        in_channels: Channels of the input.
        expanded: Channels of the depthwise convolution.
        out_channels: Channels of the result.
        kernel: Of the depthwise convolution.
        stride: Of the depthwise convolution.
        activation: A key of `ACTIVATIONS`.
        drop_path: Probability of dropping the branch (stochastic depth).
    """

    def __init__(
        self,
        in_channels: int,
        expanded: int,
        out_channels: int,
        kernel: int,
        stride: int,
        activation: str,
        drop_path: float,
    ) -> None:
        super().__init__()
        act, gate = ACTIVATIONS[activation]
        self.branch = nn.Sequential(
            nn.Conv2d(in_channels, expanded, 1, bias=False),
            nn.BatchNorm2d(expanded),
            act(),
            nn.Conv2d(expanded, expanded, kernel, stride, kernel // 2, groups=expanded, bias=False),
            nn.BatchNorm2d(expanded),
            act(),
            SqueezeExcite(expanded, max(expanded // 4, 1), gate),
            nn.Conv2d(expanded, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.is_residual = stride == 1 and in_channels == out_channels
        self.path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_channels, h, w] -> [batch, out_channels, h / stride, w / stride]."""
        y: Tensor = self.branch(x)
        return x + self.path(y) if self.is_residual else y


class MobileNet(nn.Module):
    """A 3x3 stem, inverted residuals with 3x3 and 5x5 kernels, a head with one hidden layer.

    One image: [1, 8, 8] -> [c, 8, 8] -> [c, 8, 8] -> [2c, 4, 4] twice -> logits.

    Args:
        channels: Channels ``c`` of the stem.
        expansion: Channels of a depthwise convolution, in units of its block's input.
        activation: A key of `ACTIVATIONS`.
        dropout: Before the last layer.
        drop_path: Stochastic depth of the last block.
        in_channels: Channels of the images.
        num_classes: Number of logits.

    Raises:
        ValueError: No activation of that name.
    """

    def __init__(
        self,
        channels: int = 16,
        expansion: int = 4,
        activation: str = "hardswish",
        dropout: float = 0.1,
        drop_path: float = 0.1,
        in_channels: int = 1,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={activation!r}: expected one of {', '.join(sorted(ACTIVATIONS))}."
            )
        wide, act = 2 * channels, ACTIVATIONS[activation][0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            act(),
        )
        sizes = [(channels, channels, 3, 1), (channels, wide, 3, 2), (wide, wide, 5, 1)]
        self.blocks = nn.Sequential(
            *(
                InvertedResidual(
                    before, expansion * before, after, kernel, stride, activation,
                    drop_path * index / (len(sizes) - 1),
                )
                for index, (before, after, kernel, stride) in enumerate(sizes)
            )
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Linear(wide, 2 * wide), act(), nn.Dropout(dropout), nn.Linear(2 * wide, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, num_classes] of images ``x`` [batch, in_channels, height, width]."""
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


def recipe(
    seed: int = 0,
    batch_size: int = 32,
    dtype: str = "float32",
    optimizer: str = "rmsprop",
    rho: float = 0.05,
    lr: float | None = None,
    channels: int = 16,
    activation: str = "hardswish",
    dropout: float = 0.1,
    drop_path: float = 0.1,
    num_batches: int = 8,
) -> tuple[sx.TrainStep, list[tuple[Tensor, Tensor]]]:
    """The SAM step of a `MobileNet` on real handwritten digits.

    Args:
        seed: Of the initial weights, of the order of the data and of the random numbers.
        batch_size: Examples in a batch.
        dtype: ``float32`` or ``float64``, of weights and images.
        optimizer: A key of `models.optimizers.BASE_OPTIMIZERS`.
        rho: Radius of the perturbation.
        lr: Learning rate; None takes the default of the base optimizer.
        channels: Channels of the stem.
        activation: A key of `ACTIVATIONS`.
        dropout: Before the last layer.
        drop_path: Stochastic depth of the last block.
        num_batches: How many batches to return at most.

    Returns:
        The step, and batches (x, y) of tensors.
    """
    from models.optimizers import cross_entropy_step

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MobileNet(channels, 4, activation, dropout, drop_path)
        step = cross_entropy_step(model.to(getattr(torch, dtype)), optimizer, rho, lr)
    digits = load_digits(seed, dtype)
    batches = [
        (torch.from_numpy(x), torch.from_numpy(y))
        for x, y in islice(iterate(digits.train_x, digits.train_y, batch_size), num_batches)
    ]
    return step, batches
