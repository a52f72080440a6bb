"""A multi-layer perceptron, for flat vectors or images of any shape."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.digits import iterate, load_digits

if TYPE_CHECKING:
    import sam_export as sx


class MLP(nn.Module):
    """Linear layers with ReLU (and dropout) between them; the last one returns the logits.

    Args:
        in_features: Number of values of one example, all its dimensions together.
        hidden: Width of each hidden layer.
        num_classes: Number of logits.
        dropout: After each hidden layer; 0 leaves the layers out.
    """

    def __init__(
        self,
        in_features: int = 64,
        hidden: Sequence[int] = (512, 512),
        num_classes: int = 10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = (in_features, *hidden)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout > 0 else []
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, num_classes] of ``x`` [batch, ...]."""
        logits: Tensor = self.layers(x.flatten(1))
        return logits


def recipe(
    seed: int = 0,
    batch_size: int = 32,
    dtype: str = "float32",
    optimizer: str = "sgd",
    rho: float = 0.05,
    lr: float | None = None,
    hidden: Sequence[int] = (512, 512),
    dropout: float = 0.0,
    num_batches: int = 8,
) -> tuple[sx.TrainStep, list[tuple[Tensor, Tensor]]]:
    """The SAM step of an `MLP` on real handwritten digits, as flat vectors.

    Args:
        seed: Of the initial weights, of the order of the data and of the random numbers.
        batch_size: Examples in a batch.
        dtype: ``float32`` or ``float64``, of weights and images.
        optimizer: A key of `models.optimizers.BASE_OPTIMIZERS`.
        rho: Radius of the perturbation.
        lr: Learning rate; None takes the default of the base optimizer.
        hidden: Width of each hidden layer.
        dropout: After each hidden layer.
        num_batches: How many batches to return at most.

    Returns:
        The step, and batches (x, y) of tensors.
    """
    from models.optimizers import cross_entropy_step

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MLP(hidden=hidden, dropout=dropout).to(getattr(torch, dtype))
        step = cross_entropy_step(model, optimizer, rho, lr)
    digits = load_digits(seed, dtype)
    flat = digits.train_x.reshape(len(digits.train_x), -1)
    batches = [
        (torch.from_numpy(x), torch.from_numpy(y))
        for x, y in islice(iterate(flat, digits.train_y, batch_size), num_batches)
    ]
    return step, batches
