"""Random words and masks in TorchScript: methods that loop over chunks which stay in the cache."""

from __future__ import annotations

from sam_export.artifact.philox import LEADING, MASK, MULTIPLIERS, ROUNDS, TRAILING, WEYL

METHODS = ("philox", "random_words", "random_mask")
"""Names of the methods; the last two stand for the operators of `step.philox` so called."""

_CHUNK = 32768
"""Blocks of four words at a time: fewer, and calls take longer than arithmetic; more, and the
temporaries leave the cache."""


def random_methods() -> list[str]:
    """What `artifact.philox.random_words` and `random_mask` define.

    ``philox`` returns the words in the lower 32 bits of int64, with anything above them.
    """
    (m0, m1), (w0, w1) = MULTIPLIERS, WEYL
    return f"""\
def philox(self, seed: Tensor, step: Tensor, stream: int, start: int, stop: int) -> List[Tensor]:
    key, number = int(seed), int(step)
    k0, k1 = key & {MASK}, (key >> 32) & {MASK}
    # Only the block's number differs from block to block: of the first two rounds half is scalar.
    s1 = (number & {MASK}) * {m1}
    s0 = (((s1 >> 32) & {MASK}) ^ stream ^ k0) * {m0}
    c3 = torch.arange(start, stop, dtype=torch.int64, device=seed.device) * {m0}
    c2 = (c3 >> 32).bitwise_xor_(((number >> 32) & {MASK}) ^ k1).bitwise_and_({MASK})
    k0, k1 = (k0 + {w0}) & {MASK}, (k1 + {w1}) & {MASK}
    c1 = c2.mul_({m1})
    c0 = (c1 >> 32).bitwise_xor_((s1 ^ k0) & {MASK}).bitwise_and_({MASK})
    c2 = c3.bitwise_xor_(((s0 >> 32) ^ k1) & {MASK}).bitwise_and_({MASK})
    c3 = c0.new_full([], s0)
    for _ in range({ROUNDS - 2}):
        k0, k1 = (k0 + {w0}) & {MASK}, (k1 + {w1}) & {MASK}
        c0, c2 = c0.bitwise_and_({MASK}).mul_({m0}), c2.bitwise_and_({MASK}).mul_({m1})
        c1, c3, c0, c2 = (
            c2,
            c0,
            (c2 >> 32).bitwise_xor_(c1).bitwise_xor_(k0),
            (c0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1),
        )
    return [c0, c1, c2, c3]

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
    blocks = (count + 31) // 16
    mask = torch.empty([4, 4, blocks], dtype=torch.bool, device=seed.device)
    start = 0
    while start < blocks:
        stop = min(start + {_CHUNK}, blocks)
        words = torch.empty([4, stop - start], dtype=torch.int32, device=seed.device)
        for lane, word in enumerate(self.philox(seed, step, stream, start, stop)):
            words[lane].copy_(word)
        rest = (words[0] ^ words[1]).bitwise_xor_(words[2]).bitwise_xor_(words[3])
        rest.bitwise_and_({TRAILING})
        for byte in range(4):
            value = (words << (8 * byte)).bitwise_and_({LEADING - (1 << 32)}).bitwise_or_(rest)
            torch.lt(value, threshold, out=mask[:, byte, start:stop])
        start = stop
    return mask.view(-1)[:count].reshape(size)""".splitlines()
