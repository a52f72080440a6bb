"""Philox4x32-10 against its published test vectors, and where each word comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sam_export.artifact import philox
from sam_export.parity import oracle_random
from sam_export.step.philox import composite_mask, composite_words, random_mask, random_words

ONES = 0xFFFFFFFF

# counter, key, output: the rows "philox4x32 10" of tests/kat_vectors in Random123 1.14.0,
# https://github.com/DEShawResearch/random123
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

PLACES = [
    # seed, step, stream, count
    (0, 0, 0, 10),
    (5, 3, 7, 1),
    (-1, 2**40 + 1, 2**32 - 1, 1001),
    (2**63 - 1, -2, philox.EVALUATION, 33_001),  # more than one chunk
    (1 << 32, 1 << 32, 1, 4),
    (1, 1, 1, 0),
]


@pytest.mark.parametrize(("counter", "key", "output"), PUBLISHED)
def test_published_vectors(
    counter: tuple[int, ...], key: tuple[int, int], output: tuple[int, ...]
) -> None:
    words = philox.philox(
        tuple(np.array([word], np.uint64) for word in counter), key[0] | key[1] << 32
    )
    assert [int(word[0]) for word in words] == list(output)


@pytest.mark.parametrize("place", PLACES)
def test_all_implementations_agree(place: tuple[int, int, int, int]) -> None:
    """NumPy, ATen operators, the custom operator, and the oracle's own from the paper."""
    seed, step, stream, count = place
    words = philox.random_words(seed, step, stream, count)
    assert words.dtype == np.int32
    keys = torch.tensor(seed), torch.tensor(step)
    for made in (composite_words, random_words):
        assert np.array_equal(made(*keys, (count,), stream).numpy(), words)
    flipped = oracle_random.words(seed, step, stream, count).astype(np.int64) - 2**31
    assert np.array_equal(flipped, words.astype(np.int64))


THRESHOLDS = [-(2**31), -(2**31) + 1, 1 - 2**30, 0, round(0.7 * 2**32) - 2**31, 2**31 - 1]


@pytest.mark.parametrize("place", PLACES)
def test_all_implementations_of_masks_agree(place: tuple[int, int, int, int]) -> None:
    seed, step, stream, count = place
    words = oracle_random.words(seed, step, stream, count, by_bytes=True).astype(np.int64)
    keys = torch.tensor(seed), torch.tensor(step)
    for threshold in THRESHOLDS:
        mask = philox.random_mask(seed, step, stream, count, threshold)
        assert mask.dtype == np.bool_
        assert np.array_equal(mask, words < threshold + 2**31)
        for made in (composite_mask, random_mask):
            assert np.array_equal(made(*keys, (count,), stream, threshold).numpy(), mask)


def test_where_each_decision_comes_from() -> None:
    """Decision (4 l + b) n + j has byte b of word l of block j, then what the words share."""
    count, seed, step, stream = 60, 77, 5, 9
    blocks = 4 + 1
    mask = philox.random_mask(seed, step, stream, count, 12345)
    for element in range(count):
        row, block = divmod(element, blocks)
        counter = tuple(np.array([word], np.uint64) for word in (block, stream, step, 0))
        words = [int(word[0]) for word in philox.philox(counter, seed)]
        first = words[row // 4].to_bytes(4, "big")[row % 4]
        rest = (words[0] ^ words[1] ^ words[2] ^ words[3]).to_bytes(4, "big")[1:]
        signed = int.from_bytes(bytes([first]) + rest, "big", signed=True)
        assert mask[element] == (signed < 12345)


def test_where_each_word_comes_from() -> None:
    """Element l * n + j is word l of block j, with n = ceil(10 / 4) + 1."""
    count, seed, step, stream = 10, 77, 5, 9
    words = philox.random_words(seed, step, stream, count).view(np.uint32)
    for element in range(count):
        lane, block = divmod(element, 4)
        counter = tuple(np.array([word], np.uint64) for word in (block, stream, step, 0))
        assert words[element] == philox.philox(counter, seed)[lane][0]


def test_shapes_are_filled_in_row_major_order() -> None:
    seed, step = torch.tensor(1), torch.tensor(2)
    flat = random_words(seed, step, (24,), 3)
    for size in ((2, 3, 4), (24, 1), (1, 24)):
        assert torch.equal(random_words(seed, step, size, 3), flat.reshape(size))
    assert random_words(seed, step, (), 3).shape == ()
    assert random_words(seed, step, (4, 0), 3).shape == (4, 0)
    flat = random_mask(seed, step, (24,), 3, 0)
    assert torch.equal(random_mask(seed, step, (2, 3, 4), 3, 0), flat.reshape(2, 3, 4))
    assert random_mask(seed, step, (), 3, 0).shape == ()
    assert random_mask(seed, step, (4, 0), 3, 0).shape == (4, 0)


@pytest.mark.parametrize("change", ["seed", "high half of the seed", "step", "high step", "stream"])
def test_every_part_of_the_key_and_counter_matters(change: str) -> None:
    base = philox.random_words(3, 4, 5, 4096)
    seed = 3 + (change == "seed") + ((change == "high half of the seed") << 32)
    step = 4 + (change == "step") + ((change == "high step") << 32)
    other = philox.random_words(seed, step, 5 + (change == "stream"), 4096)
    assert np.mean(base == other) < 0.01
    assert np.bitwise_count(base.view(np.uint32) ^ other.view(np.uint32)).mean() == pytest.approx(
        16, abs=0.2
    )
