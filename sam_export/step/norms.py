"""The L2 norm of all gradients together."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-12
"""Added to the gradient norm, so that a gradient of zero gives a perturbation of zero."""


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    r"""One L2 norm over all gradients: ``sqrt(sum_i ||g_i||_2^2)``.

    Accumulated in at least float32, gathered on the device of the first gradient.

    Args:
        grads: Tensors of any shapes, floating dtypes and devices.

    Returns:
        A scalar; its dtype is the widest of the gradients' and float32.
    """
    norm: Tensor = torch.linalg.vector_norm(norms_of(grads))
    return norm


def norms_of(grads: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each gradient, a vector, as `global_norm` gathers them."""
    dtype = functools.reduce(torch.promote_types, (g.dtype for g in grads), torch.float32)
    return torch.stack(
        [torch.linalg.vector_norm(g, dtype=dtype).to(grads[0].device) for g in grads]
    )
