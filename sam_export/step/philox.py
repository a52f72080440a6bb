"""The operators ``sam_export::random_words`` and ``random_mask``: Philox4x32-10 in a graph.

Each target says what becomes of the nodes: `COMPOSITES` (Inductor), a loop over chunks
(TorchScript), or an input that the session fills (ONNX).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sam_export.artifact import philox

_LIBRARY = torch.library.Library("sam_export", "DEF")
_LIBRARY.define("random_words(Tensor seed, Tensor step, SymInt[] size, int stream) -> Tensor")
_LIBRARY.define(
    "random_mask(Tensor seed, Tensor step, SymInt[] size, int stream, int threshold) -> Tensor"
)


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


def random_mask(
    seed: Tensor, step: Tensor, size: Sequence[int], stream: int, threshold: int
) -> Tensor:
    """Decisions, as `artifact.philox.random_mask` defines them.

    Args:
        seed: int64 scalar.
        step: int64 scalar: number of the step.
        size: Shape of the result, filled in row-major order.
        stream: 0 to 2^32 - 1.
        threshold: True with probability ``threshold / 2^32 + 1/2``; -2^31 to 2^31 - 1.

    Returns:
        bool of shape ``size``, on the device of ``seed``.
    """
    mask: Tensor = torch.ops.sam_export.random_mask(seed, step, size, stream, threshold)
    return mask


@dataclass(frozen=True)
class DrawSource:
    """What one draw of a step is made from.

    Attributes:
        seed: int64 scalar.
        step: int64 scalar: number of the step.
        stream: The first of its `artifact.philox.STREAMS_PER_DRAW` streams.
    """

    seed: Tensor
    step: Tensor
    stream: int

    def words(self, size: Sequence[int], part: int) -> Tensor:
        """`random_words` of one of its streams."""
        return random_words(self.seed, self.step, size, self.stream + part)

    def mask(self, size: Sequence[int], threshold: int) -> Tensor:
        """`random_mask` of its first stream."""
        return random_mask(self.seed, self.step, size, self.stream, threshold)


def composite_words(seed: Tensor, step: Tensor, size: Sequence[int], stream: int) -> Tensor:
    """`random_words` in ATen operators."""
    count = math.prod(size)
    return _laid_out(_words(seed, step, philox.blocks_for(count), stream), count, size)


def composite_mask(
    seed: Tensor, step: Tensor, size: Sequence[int], stream: int, threshold: int
) -> Tensor:
    """`random_mask` in ATen operators.

    The comparison comes last: Inductor stores a bool from a vector at 12 to 28 ns each, and leaves
    a comparison of stored numbers to whoever reads them, at 1 ns.
    """
    count = math.prod(size)
    blocks = philox.blocks_for(count, philox.DECISIONS_PER_BLOCK)
    words = _words(seed, step, blocks, stream)
    rest = (words[0] ^ words[1] ^ words[2] ^ words[3]) & philox.TRAILING
    leading = philox.LEADING - (1 << 32)  # as a signed number
    rows = [((word << shift) & leading) | rest for word in words for shift in (0, 8, 16, 24)]
    return _laid_out(rows, count, size) < threshold


def _laid_out(rows: list[Tensor], count: int, size: Sequence[int]) -> Tensor:
    # By index: to cut the end off, torch.export would want proof that it is there.
    kept = torch.arange(count, device=rows[0].device)
    return torch.cat(rows).index_select(0, kept).reshape(size)


def _words(seed: Tensor, step: Tensor, blocks: int, stream: int) -> list[Tensor]:
    """The four words of the blocks, int32, by arithmetic on int64.

    Products of two 32-bit words overflow int64 where the top bit is set; they wrap, and the shift
    followed by the mask gives the high half whatever the sign.
    """
    mask = philox.MASK
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
    return [word.to(torch.int32) for word in (c0, c1 & mask, c2, c3 & mask)]  # type: ignore[union-attr]


def _words_on_cpu(seed: Tensor, step: Tensor, size: Sequence[int], stream: int) -> Tensor:
    words = philox.random_words(int(seed), int(step), stream, math.prod(size))
    return torch.from_numpy(words).reshape(size)


def _mask_on_cpu(
    seed: Tensor, step: Tensor, size: Sequence[int], stream: int, threshold: int
) -> Tensor:
    mask = philox.random_mask(int(seed), int(step), stream, math.prod(size), threshold)
    return torch.from_numpy(mask).reshape(size)


def _shape_of_words(seed: Tensor, step: Tensor, size: Sequence[int], stream: int) -> Tensor:
    return torch.empty(size, dtype=torch.int32, device=seed.device)


def _shape_of_mask(
    seed: Tensor, step: Tensor, size: Sequence[int], stream: int, threshold: int
) -> Tensor:
    return torch.empty(size, dtype=torch.bool, device=seed.device)


COMPOSITES: dict[Any, Callable[..., Any]] = {
    torch.ops.sam_export.random_words.default: composite_words,
    torch.ops.sam_export.random_mask.default: composite_mask,
}
"""Each operator in plain ATen arithmetic, which Inductor fuses into one loop."""

_LIBRARY.impl("random_words", composite_words, "CompositeExplicitAutograd")
_LIBRARY.impl("random_words", _words_on_cpu, "CPU")
torch.library.register_fake("sam_export::random_words", _shape_of_words, lib=_LIBRARY)
_LIBRARY.impl("random_mask", composite_mask, "CompositeExplicitAutograd")
_LIBRARY.impl("random_mask", _mask_on_cpu, "CPU")
torch.library.register_fake("sam_export::random_mask", _shape_of_mask, lib=_LIBRARY)
