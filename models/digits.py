"""scikit-learn's handwritten digits: 1797 real 8x8 images that need no download.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49 (the copy that scikit-learn installs).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LARGEST_PIXEL = 16.0


@dataclass(frozen=True)
class Digits:
    """Images of handwritten digits in a seeded order, split into training and test set.

    Attributes:
        train_x: Training images, float[n, 1, 8, 8], between 0 and 1.
        train_y: Their digits, int64[n].
        test_x: Test images, float[m, 1, 8, 8].
        test_y: Their digits, int64[m].
    """

    train_x: NDArray[Any]
    train_y: NDArray[np.int64]
    test_x: NDArray[Any]
    test_y: NDArray[np.int64]


def load_digits(seed: int = 0, dtype: str = "float32", test_fraction: float = 0.2) -> Digits:
    """The digits, shuffled by ``seed`` and split.

    Args:
        seed: Of the order, and so of the split.
        dtype: NumPy's name of the images' element type.
        test_fraction: Part of the images that is kept for the test set, between 0 and 1.
    """
    # Here, because the models do not need scikit-learn.
    from sklearn.datasets import load_digits as load_sklearn_digits

    data = load_sklearn_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images = (data.images[order, None] / _LARGEST_PIXEL).astype(dtype)
    labels = data.target[order].astype(np.int64)
    train = len(order) - round(test_fraction * len(order))
    return Digits(images[:train], labels[:train], images[train:], labels[train:])


def iterate(
    x: NDArray[Any], y: NDArray[Any], batch_size: int
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Consecutive batches in the order of the data; the last one may be smaller."""
    for start in range(0, len(x), batch_size):
        yield x[start : start + batch_size], y[start : start + batch_size]
