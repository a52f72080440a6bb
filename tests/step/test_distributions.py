"""Distributions: exact values, moments and independence, with fixed seeds.

Every bound is four or more standard deviations of the statistic under the hypothesis that the
numbers are what they should be; the seeds are fixed, so a test that passes once always passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from sam_export.step import distributions
from sam_export.step.philox import DrawSource

COUNT = 200_000
SIZE = (COUNT,)


def source_of(seed: int = 1, step: int = 0, draw: int = 0) -> DrawSource:
    return DrawSource(torch.tensor(seed), torch.tensor(step), 2 * draw)


def words_of(**place: int) -> Callable[[Sequence[int], int], Tensor]:
    return source_of(**place).words


def bernoulli(size: Sequence[int], p: float) -> Tensor:
    source = source_of()
    return distributions.bernoulli(source.words, source.mask, size, p)


def uniforms(**place: int) -> Tensor:
    return distributions.uniform(words_of(**place), SIZE, torch.float64)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def test_the_square_root_is_right() -> None:
    x = torch.cat([torch.rand(50_000, dtype=torch.float64) * 46, 2.0 ** -torch.arange(40).double()])
    x = torch.cat([x, torch.tensor([46.4, 63.9, 1 - 2**-53, 0.25], dtype=torch.float64)])
    error = (distributions._sqrt(x) / torch.sqrt(x) - 1).abs()
    assert float(error.max()) < 3e-16


def test_the_logarithm_and_the_cosine_are_right() -> None:
    x = torch.cat([torch.rand(50_000, dtype=torch.float64), 2.0 ** -torch.arange(34).double()])
    x = x.clamp_min(2.0**-34)
    expected = torch.log(x)
    error = (distributions._log(x) - expected).abs()
    assert float((error - 4e-16 * expected.abs()).max()) < 4e-16
    turn = torch.cat([torch.rand(50_000, dtype=torch.float64), torch.arange(8).double() / 8])
    assert (
        float((distributions._cos_of_turn(turn) - torch.cos(2 * math.pi * turn)).abs().max())
        < 1e-15
    )


@pytest.mark.parametrize("seed", [1, 2**40])
def test_uniform_moments_and_chi_square(seed: int) -> None:
    u = uniforms(seed=seed)
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    deviation = math.sqrt(1 / 12 / COUNT)
    assert abs(float(u.mean()) - 0.5) < 4 * deviation
    assert abs(float(u.var()) - 1 / 12) < 4 * math.sqrt(1 / 180 / COUNT)
    bins = 256
    counts = torch.histc(u, bins, 0, 1)
    chi_square = float(((counts - COUNT / bins) ** 2).sum() / (COUNT / bins))
    assert abs(chi_square - (bins - 1)) < 4 * math.sqrt(2 * (bins - 1))


def test_a_narrow_dtype_gets_the_leading_bits_of_a_wide_one() -> None:
    wide = uniforms()
    assert len(torch.unique(wide * 2.0**53 % 2**21)) > COUNT * 0.9  # its last bits are random too
    for dtype, bits in ((torch.float32, 24), (torch.float16, 11), (torch.bfloat16, 8)):
        narrow = distributions.uniform(words_of(), SIZE, dtype)
        assert narrow.dtype == dtype
        assert torch.equal(narrow.double(), torch.floor(wide * 2.0**bits) / 2.0**bits)


def test_uniform_between_stays_below_its_upper_bound() -> None:
    for dtype in (torch.float32, torch.float64, torch.float16):
        values = distributions.uniform_between(words_of(), SIZE, dtype, 1.0, 2.0)
        assert float(values.min()) >= 1
        assert float(values.max()) < 2
    assert torch.equal(
        distributions.uniform_between(words_of(), (3,), torch.float32, 5.0, 5.0),
        torch.full((3,), 5.0),
    )


@pytest.mark.parametrize("p", [0.0, 1e-4, 1 / 64, 0.1, 0.5, 0.7, 63 / 64, 0.9999, 1.0])
def test_bernoulli(p: float) -> None:
    """Of one probability for all, and of one for each."""
    per_element = torch.full(SIZE, p, dtype=torch.float64)
    mask = bernoulli(SIZE, p)
    masks = {"one": mask, "each": distributions.bernoulli_of(words_of(), per_element)}
    for mask in masks.values():
        assert mask.dtype == torch.bool
        assert abs(float(mask.double().mean()) - p) <= 4 * math.sqrt(p * (1 - p) / COUNT)
    assert torch.equal(masks["each"], uniforms() < round(p * 2**32) / 2**32)


@pytest.mark.parametrize("p", [1 / 64, 0.1, 0.5, 0.9])
def test_the_decisions_of_a_block_are_as_good_as_independent(p: float) -> None:
    """All pairs of the 16; two million blocks. And four of them, one from each word."""
    blocks = 1 << 21
    mask = bernoulli((16 * (blocks - 1),), p)
    rows = torch.nn.functional.pad(mask, (0, 16)).view(16, blocks)[:, :-1].double()
    rows = (rows - p) / math.sqrt(p * (1 - p))
    together = rows @ rows.T / blocks - torch.eye(16, dtype=torch.float64)
    off = together - torch.diag(together.diagonal())
    assert float(off.abs().max()) < 2**-18 / (p * (1 - p)) + 4.5 / math.sqrt(blocks)
    for byte in range(4):
        four = rows.view(4, 4, -1)[:, byte].prod(0)
        assert abs(float(four.mean())) < 4.5 * float(four.std()) / math.sqrt(blocks)


def test_normal_moments_and_distribution() -> None:
    z = distributions.normal(words_of(), SIZE)
    # Standard deviations of the first four raw moments of a normal sample.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - moment) < 4 * math.sqrt(variance / COUNT)
    # Kolmogorov-Smirnov: sqrt(n) D is above 1.95 once in a thousand.
    cdf = torch.special.ndtr(torch.sort(z).values)
    steps = torch.arange(1, COUNT + 1, dtype=torch.float64) / COUNT
    assert math.sqrt(COUNT) * float((cdf - steps).abs().max()) < 1.95


def test_exponential_moments() -> None:
    e = distributions.exponential(words_of(), SIZE)
    assert float(e.min()) > 0  # Gumbel noise takes its logarithm
    assert abs(float(e.mean()) - 1) < 4 * math.sqrt(1 / COUNT)
    assert abs(float(e.var()) - 1) < 4 * math.sqrt(8 / COUNT)


@pytest.mark.parametrize("bounds", [(0, 2), (-3, 7), (0, 1000), (0, 2**40), (0, 2**63 - 1)])
def test_integers(bounds: tuple[int, int]) -> None:
    low, high = bounds
    values = distributions.integers(words_of(), SIZE, low, high)
    assert low <= int(values.min())
    assert int(values.max()) < high
    share = ((values.double() - low) / (high - low) * 10).floor()  # ten equal parts, where possible
    if (high - low) % 10 == 0 or high - low > 2**32:
        counts = torch.bincount(share.long().clamp_max(9), minlength=10).double()
        assert float(((counts - COUNT / 10) ** 2).sum() / (COUNT / 10)) < 9 + 4 * math.sqrt(18)


def test_a_permutation_is_one_and_every_place_is_as_likely() -> None:
    firsts = np.zeros((6, 6))
    for step in range(1200):
        order = distributions.permutation(words_of(step=step), 6)
        assert sorted(order.tolist()) == list(range(6))
        firsts[np.arange(6), order.numpy()] += 1
    assert np.abs(firsts - 200).max() < 4 * math.sqrt(200 * 5 / 6)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 2},
        {"seed": 1 + 2**32},
        {"step": 1},
        {"step": 2**32},
        {"draw": 1},
        {"draw": 1, "step": 1},
    ],
    ids=str,
)
def test_neighbouring_seeds_steps_and_draws_are_uncorrelated(other: dict[str, int]) -> None:
    here, there = uniforms(), uniforms(**other)
    assert abs(correlation(here, there)) < 4 / math.sqrt(COUNT)
    assert abs(correlation((here - 0.5) ** 2, (there - 0.5) ** 2)) < 4 / math.sqrt(COUNT)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 16, COUNT // 4 + 1, COUNT // 2 + 2])
def test_neighbouring_elements_are_uncorrelated(lag: int) -> None:
    """Also those a quarter of the tensor apart, which come from the same block."""
    u = uniforms()
    assert abs(correlation(u[:-lag], u[lag:])) < 4 / math.sqrt(COUNT - lag)
    mask = bernoulli(SIZE, 0.3).double()
    assert abs(correlation(mask[:-lag], mask[lag:])) < 4 / math.sqrt(COUNT - lag)


def test_both_words_of_a_draw_are_uncorrelated() -> None:
    words = words_of()
    a, b = words(SIZE, 0).double(), words(SIZE, 1).double()
    assert abs(correlation(a, b)) < 4 / math.sqrt(COUNT)


def test_every_bit_is_fair() -> None:
    bits = np.unpackbits(words_of()(SIZE, 0).numpy().view(np.uint8)).reshape(COUNT, 32)
    assert np.abs(bits.mean(0) - 0.5).max() < 4.5 * 0.5 / math.sqrt(COUNT)
    together = np.corrcoef(bits.T) - np.eye(32)
    assert np.abs(together).max() < 5 / math.sqrt(COUNT)
