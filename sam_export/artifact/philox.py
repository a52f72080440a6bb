"""The random number generator of a step: Philox4x32-10, in NumPy.

Counter-based: a word is a function of where it is drawn, not of what was drawn before, so every
target can draw the same words in any order. Here it runs where there is no torch; `step.philox`
has it in torch operators, for graphs.

Source: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel Random Numbers: As Easy as 1,
    2, 3", SC 2011, https://doi.org/10.1145/2063384.2063405, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

NAME = "philox4x32-10"
"""The generator's name in manifests."""

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF

STREAMS_PER_DRAW = 2
"""Draw ``d`` of a step owns the streams ``2 d`` (leading bits) and ``2 d + 1`` (trailing bits)."""

STEPS_PER_PART = 1 << 40
"""A part of a batch that is a call of its own draws as the step ``step + part * 2^40``."""

EVALUATION = 1 << 31
"""Streams from here on belong to evaluation programs; below it, to the step."""

_CHUNK = 16384  # blocks whose temporaries stay in the cache

DECISIONS_PER_BLOCK = 16
"""Of a mask: one for each byte of a block."""

LEADING, TRAILING = 0xFF000000, 0x00FFFFFF
"""Bits of a 32-bit number: its first byte, and the rest."""


def round_keys(seed: int) -> list[tuple[int, int]]:
    """The two words of the key in each round; the key is the 64 bits of ``seed``, low word first.

    ``k_r = k_0 + r * W  (mod 2^32)``.
    """
    first, second = seed & MASK, (seed >> 32) & MASK
    return [((first + r * WEYL[0]) & MASK, (second + r * WEYL[1]) & MASK) for r in range(ROUNDS)]


def random_words(seed: int, step: int, stream: int, count: int) -> NDArray[np.int32]:
    """``count`` words of 32 random bits.

    With ``n = ceil(count / 4) + 1`` blocks, block ``j`` is the generator's output on the counter
    ``(j, stream, step mod 2^32, step div 2^32)`` and the key ``(seed mod 2^32, seed div 2^32)``;
    its word ``l`` is element ``l * n + j``. (One block more than needed: `torch.export` fixes a
    size that is 1 in its example.)

    Args:
        seed: Any 64 bits, signed or not.
        step: Number of the step; 64 bits, signed or not.
        stream: 0 to 2^32 - 1.
        count: How many, at least 0 and at most 2^34.

    Returns:
        int32[count]: the words, their bits read as signed numbers.
    """
    blocks = blocks_for(count)
    out = np.empty((4, blocks), np.uint32)
    for part, words in _chunks(seed, step, stream, blocks):
        for row, values in zip(out, words, strict=True):
            row[part] = values
    return out.reshape(-1)[:count].view(np.int32)


def random_mask(seed: int, step: int, stream: int, count: int, threshold: int) -> NDArray[np.bool_]:
    """``count`` decisions, four from each word; true with ``p = threshold / 2^32 + 1/2``.

    With ``n = ceil(count / 16) + 1`` blocks, decision ``(4 l + b) n + j`` is ``v < threshold``. The
    first byte of ``v`` is byte ``b``, from the top, of word ``l`` of block ``j``; its other bits
    are the last 24 of the exclusive or of the block's four words; it is read as a signed number.

    All 32 bits of ``v`` are random, so the probability is exact. Two decisions of a block are
    independent unless both their first bytes equal the threshold's, once in 2^16: their correlation
    is at most ``2^-18 / (p (1 - p))``.

    Args:
        seed: Any 64 bits, signed or not.
        step: Number of the step; 64 bits, signed or not.
        stream: 0 to 2^32 - 1.
        count: How many, at least 0 and at most 2^36.
        threshold: -2^31 (never true) to 2^31 - 1.

    Returns:
        bool[count].
    """
    blocks = blocks_for(count, DECISIONS_PER_BLOCK)
    out = np.empty((DECISIONS_PER_BLOCK, blocks), np.bool_)
    leading, bound = np.uint32(LEADING), np.int32(threshold)
    for part, wide in _chunks(seed, step, stream, blocks):
        words = [word.astype(np.uint32) for word in wide]
        rest = words[0] ^ words[1] ^ words[2] ^ words[3]
        rest &= np.uint32(TRAILING)
        value = np.empty_like(rest)
        for row, into in enumerate(out[:, part]):
            np.left_shift(words[row // 4], np.uint32(8 * (row % 4)), out=value)
            value &= leading
            value |= rest
            np.less(value.view(np.int32), bound, out=into)
    return out.reshape(-1)[:count]


def blocks_for(count: int, per_block: int = 4) -> int:
    """Blocks for ``count`` numbers, of which a block holds ``per_block``; one more than needed."""
    return (count + 2 * per_block - 1) // per_block


def _chunks(
    seed: int, step: int, stream: int, blocks: int
) -> Iterator[tuple[slice, tuple[NDArray[np.uint64], ...]]]:
    """The four words of all blocks, so many at a time that they stay in the cache."""
    for start in range(0, blocks, _CHUNK):
        stop = min(start + _CHUNK, blocks)
        counter = (
            np.arange(start, stop, dtype=np.uint64),
            np.full(stop - start, stream, np.uint64),
            np.full(stop - start, step & MASK, np.uint64),
            np.full(stop - start, (step >> 32) & MASK, np.uint64),
        )
        yield slice(start, stop), philox(counter, seed)


def philox(counter: tuple[NDArray[np.uint64], ...], seed: int) -> tuple[NDArray[np.uint64], ...]:
    """Philox4x32-10 of many counters under one key.

    A round, with ``hi`` and ``lo`` the halves of a 64-bit product::

        c0, c1, c2, c3 = hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)

    Args:
        counter: Four words below 2^32 each, as uint64; they are overwritten.
        seed: The key, 64 bits.

    Returns:
        Four words below 2^32 each, as uint64.
    """
    c0, c1, c2, c3 = counter
    p0, p1 = np.empty_like(c0), np.empty_like(c2)
    mask, half = np.uint64(MASK), np.uint64(32)
    m0, m1 = map(np.uint64, MULTIPLIERS)
    for k0, k1 in round_keys(seed):
        np.multiply(c0, m0, out=p0)
        np.multiply(c2, m1, out=p1)
        for word, product, other, key in ((c0, p1, c1, k0), (c2, p0, c3, k1)):
            np.right_shift(product, half, out=word)
            word ^= other
            word ^= np.uint64(key)
            word &= mask
        # The low halves stay inside the products: only their low bits are ever used again.
        c1, c3, p0, p1 = p1, p0, c3, c1
    c1 &= mask
    c3 &= mask
    return c0, c1, c2, c3
