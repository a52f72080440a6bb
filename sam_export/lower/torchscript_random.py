"""Random words in TorchScript: a method that loops over chunks which stay in the cache."""

from __future__ import annotations

from sam_export.artifact.philox import MASK, MULTIPLIERS, ROUNDS, WEYL

METHOD = "random_words"
"""Name of the method."""

CHUNK = 32768
"""Blocks of four words at a time: fewer, and calls take longer than arithmetic; more, and the
temporaries leave the cache."""


def random_words_method() -> list[str]:
    """``random_words(seed, step, size, stream)``, as `artifact.philox.random_words` defines it."""
    return f"""\
def {METHOD}(self, seed: Tensor, step: Tensor, size: List[int], stream: int) -> Tensor:
    count = 1
    for extent in size:
        count *= extent
    blocks = (count + 7) // 4
    key, number = int(seed), int(step)
    device = seed.device
    words = torch.empty([4, blocks], dtype=torch.int32, device=device)
    start = 0
    while start < blocks:
        stop = min(start + {CHUNK}, blocks)
        c0 = torch.arange(start, stop, dtype=torch.int64, device=device)
        c1 = torch.full_like(c0, stream)
        c2 = torch.full_like(c0, number & {MASK})
        c3 = torch.full_like(c0, (number >> 32) & {MASK})
        k0, k1 = key & {MASK}, (key >> 32) & {MASK}
        for _ in range({ROUNDS}):
            p0, p1 = c0 * {MULTIPLIERS[0]}, c2 * {MULTIPLIERS[1]}
            c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_({MASK})
            c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_({MASK})
            c1, c3 = p1, p0
            k0, k1 = (k0 + {WEYL[0]}) & {MASK}, (k1 + {WEYL[1]}) & {MASK}
        words[0, start:stop].copy_(c0)
        words[1, start:stop].copy_(c1.bitwise_and_({MASK}))
        words[2, start:stop].copy_(c2)
        words[3, start:stop].copy_(c3.bitwise_and_({MASK}))
        start = stop
    return words.view(-1)[:count].reshape(size)""".splitlines()
