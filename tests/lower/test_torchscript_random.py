"""The TorchScript methods that draw, against the oracle's own generator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sam_export.lower import torchscript_random
from sam_export.parity import oracle_random
from tests.artifact.test_philox import PLACES, THRESHOLDS


@pytest.fixture(scope="module", params=[1, 1000, torchscript_random._CHUNK], ids="chunk {}".format)
def methods(request: pytest.FixtureRequest) -> Any:
    """As functions; ends of chunks fall anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchscript_random, "_CHUNK", request.param)
        source = "\n".join(torchscript_random.random_methods())
    return torch.jit.CompilationUnit(source.replace("self, ", "").replace("self.", "") + "\n")


@pytest.mark.parametrize("place", PLACES)
def test_words_and_masks(methods: Any, place: tuple[int, int, int, int]) -> None:
    seed, step, stream, count = place
    count = min(count, 3001)
    keys = torch.tensor(seed), torch.tensor(step)
    words = oracle_random.words(seed, step, stream, count).astype(np.int64)
    found = methods.random_words(*keys, [count], stream)
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), words - 2**31)
    words = oracle_random.words(seed, step, stream, count, by_bytes=True).astype(np.int64)
    for threshold in THRESHOLDS:
        found = methods.random_mask(*keys, [count], stream, threshold)
        assert np.array_equal(found.numpy(), words < threshold + 2**31)


def test_more_than_one_chunk(methods: Any) -> None:
    words = methods.random_words(torch.tensor(7), torch.tensor(8), [140_000], 9).numpy()
    expected = oracle_random.words(7, 8, 9, 140_000).astype(np.int64) - 2**31
    assert np.array_equal(words, expected)
