"""Random words and masks in TorchScript: methods that loop over chunks which stay in the cache."""

from __future__ import annotations

from sam_export.artifact.philox import MASK, MULTIPLIERS, ROUNDS, WEYL

METHODS = ("philox", "random_words", "random_mask")
"""Names of the methods; the last two stand for the operators of `step.philox` so called."""

_CHUNK = 32768
"""Blocks of four words at a time: fewer, and calls take longer than arithmetic; more, and the
temporaries leave the cache."""

_TO_UPPER = 1 << 32
_SWAP_TO_UPPER = 1 << 48 | 1 << 16
"""Factors that put a word, or the word with its halves swapped, into the upper 32 bits of 64."""


def random_methods() -> list[str]:
    """What `artifact.philox.random_words` and `random_mask` define."""
    return f"""\
def philox(self, seed: Tensor, step: Tensor, stream: int, start: int, stop: int) -> List[Tensor]:
    key, number = int(seed), int(step)
    c0 = torch.arange(start, stop, dtype=torch.int64, device=seed.device)
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
    return [c0, c1.bitwise_and_({MASK}), c2, c3.bitwise_and_({MASK})]

def random_words(self, seed: Tensor, step: Tensor, size: List[int], stream: int) -> Tensor:
    count = 1
    for extent in size:
        count *= extent
    blocks = (count + 7) // 4
    words = torch.empty([4, blocks], dtype=torch.int32, device=seed.device)
    start = 0
    while start < blocks:
        stop = min(start + {_CHUNK}, blocks)
        for lane, word in enumerate(self.philox(seed, step, stream, start, stop)):
            words[lane, start:stop].copy_(word)
        start = stop
    return words.view(-1)[:count].reshape(size)

def random_mask(self, seed: Tensor, step: Tensor, size: List[int], stream: int,
                threshold: int) -> Tensor:
    count = 1
    for extent in size:
        count *= extent
    blocks = (count + 15) // 8
    mask = torch.empty([8, blocks], dtype=torch.bool, device=seed.device)
    bound = threshold * {_TO_UPPER}
    start = 0
    while start < blocks:
        stop = min(start + {_CHUNK}, blocks)
        for lane, word in enumerate(self.philox(seed, step, stream, start, stop)):
            torch.lt(word * {_SWAP_TO_UPPER}, bound, out=mask[lane + 4, start:stop])
            torch.lt(word.mul_({_TO_UPPER}), bound, out=mask[lane, start:stop])
        start = stop
    return mask.view(-1)[:count].reshape(size)""".splitlines()
