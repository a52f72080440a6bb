"""The operator ``sam_export::random_words``: Philox4x32-10 as one node of a graph.

Each target says what becomes of the node: `composite` (plain ATen integer arithmetic, which
Inductor fuses into one loop), a loop over chunks (TorchScript), or an input that the session fills
(ONNX).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_export.artifact import philox

_LIBRARY = torch.library.Library("sam_export", "DEF")
_LIBRARY.define("random_words(Tensor seed, Tensor step, SymInt[] size, int stream) -> Tensor")


def random_words(seed: Tensor, step: Tensor, size: Sequence[int], stream: int) -> Tensor:
    """Words of 32 random bits, as `artifact.philox.random_words` defines them.

    Args:
        seed: int64 scalar.
        step: int64 scalar: number of the step.
        size: Shape of the result; words are laid out in row-major order.
        stream: 0 to 2^32 - 1.

    Returns:
        int32 of shape ``size``, on the device of ``seed``.
    """
    words: Tensor = torch.ops.sam_export.random_words(seed, step, size, stream)
    return words


def composite(seed: Tensor, step: Tensor, size: Sequence[int], stream: int) -> Tensor:
    """`random_words` in ATen operators on int64 tensors.

    Products of two 32-bit words overflow int64 where the top bit is set; they wrap, and the shift
    followed by the mask gives the high half whatever the sign.
    """
    mask = philox.MASK
    count = 1
    for extent in size:
        count = count * extent
    blocks = philox.blocks_for(count)
    c0 = torch.arange(blocks, dtype=torch.int64, device=seed.device)
    c1: Tensor | int = stream
    c2, c3 = step & mask, (step >> 32) & mask
    k0, k1 = seed & mask, (seed >> 32) & mask
    m0, m1 = philox.MULTIPLIERS
    w0, w1 = philox.WEYL
    for index in range(philox.ROUNDS):
        if index:
            k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & mask, p1, ((p0 >> 32) ^ c3 ^ k1) & mask, p0
    words = [word.to(torch.int32) for word in (c0, c1 & mask, c2, c3 & mask)]  # type: ignore[union-attr]
    # By index: to cut the end off, torch.export would want proof that it is there.
    kept = torch.arange(count, device=seed.device)
    return torch.cat(words).index_select(0, kept).reshape(size)


def _on_cpu(seed: Tensor, step: Tensor, size: Sequence[int], stream: int) -> Tensor:
    shape = torch.Size(size)
    words = philox.random_words(int(seed), int(step), stream, shape.numel())
    return torch.from_numpy(words).reshape(shape)


def _shape_only(seed: Tensor, step: Tensor, size: Sequence[int], stream: int) -> Tensor:
    return torch.empty(size, dtype=torch.int32, device=seed.device)


_LIBRARY.impl("random_words", composite, "CompositeExplicitAutograd")
_LIBRARY.impl("random_words", _on_cpu, "CPU")
torch.library.register_fake("sam_export::random_words", _shape_only, lib=_LIBRARY)
