"""The random numbers of the oracle: Philox4x32-10 once more, written from the paper, in NumPy.

It imports nothing of this package, on purpose; what a step draws is agreed on in words only:

* key: the 64 bits of the seed, low word first; counter: (block, stream, step low, step high);
* draw ``d`` of a pass has the streams ``2 d`` and ``2 d + 1``; of ``n`` numbers, number ``i`` is
  word ``i // b`` of block ``i % b``, ``b = ceil(n / 4) + 1``, with its first bit flipped;
* decisions of one probability from 1/64 to 63/64 take a byte each: ``b = ceil(n / 16) + 1``, and
  number ``i`` has byte ``i // b`` (word by word, from the top) of block ``i % b`` as its first, and
  the last three bytes of the exclusive or of the block's words as its others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_FIRST = 10**9
"""Torch's generator is seeded with this plus the number of the next draw, so that a checkpointed
layer, which puts the generator back and runs again, draws the same again."""


def words(
    seed: int, step: int, stream: int, count: int, by_bytes: bool = False
) -> NDArray[np.uint64]:
    """The first ``count`` words of a stream, first bit flipped, as numbers from 0 to 2^32 - 1.

    With ``by_bytes``, each byte of a word is the first of a number of its own.

    Source: J. K. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011,
        https://doi.org/10.1145/2063384.2063405
    """
    blocks = math.ceil(count / (16 if by_bytes else 4)) + 1
    low32 = np.uint64(2**32 - 1)
    x = np.empty((4, blocks), np.uint64)
    x[0] = np.arange(blocks)
    x[1:] = [[stream], [step % 2**32], [step // 2**32 % 2**32]]
    key = [seed % 2**32, seed // 2**32 % 2**32]
    for _ in range(10):
        first = x[0] * np.uint64(0xD2511F53)
        second = x[2] * np.uint64(0xCD9E8D57)
        x = np.stack(
            [
                (second >> np.uint64(32)) ^ x[1] ^ np.uint64(key[0]),
                second & low32,
                (first >> np.uint64(32)) ^ x[3] ^ np.uint64(key[1]),
                first & low32,
            ]
        )
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    if by_bytes:
        rest = np.bitwise_xor.reduce(x) % np.uint64(2**24)
        first_bytes = [x // np.uint64(256**b) % np.uint64(256) for b in (3, 2, 1, 0)]
        x = np.stack(first_bytes, axis=1) * np.uint64(2**24) + rest
    return x.reshape(-1)[:count] ^ np.uint64(2**31)


class OracleDraws(TorchDispatchMode):
    """While it is active, random operators of torch get the numbers of one step.

    Args:
        seed: 64 bits.
        step: Number of the step.
        first: Number of the first draw.
    """

    def __init__(self, seed: int, step: int, first: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed, self._step = seed, step
        self.first = self.next = first

    def __enter__(self) -> OracleDraws:
        self._saved = torch.get_rng_state()
        torch.manual_seed(_FIRST + self.first)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        torch.set_rng_state(self._saved)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operator of torch."""
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        method = getattr(self, f"_{name.rstrip('_')}", None)
        if torch.Tag.nondeterministic_seeded not in func.tags or method is None:
            return func(*args, **kwargs)
        given = {a.name: a.default_value for a in func._schema.arguments}
        given |= dict(zip(given, args, strict=False)) | kwargs
        if name.startswith(("native_dropout", "rrelu_with_noise")):
            output = method(given)
            return given["self"].copy_(output) if name.endswith("_") else output
        size = given["size"] if "size" in given else [given["n"]] if "n" in given else None
        like = given.get("self")
        if size is None:
            tensors = [value for value in given.values() if isinstance(value, Tensor)]
            like = like if isinstance(like, Tensor) else tensors[0]
            size = torch.broadcast_shapes(*(t.shape for t in tensors))
        values = torch.from_numpy(np.asarray(method(given, tuple(size)))).reshape(tuple(size))
        if name.endswith("_"):
            return given["self"].copy_(values)
        dtype = given.get("dtype") or (like.dtype if isinstance(like, Tensor) else None)
        if not isinstance(dtype, torch.dtype):  # the schema's own default is a number
            dtype = torch.int64 if name in ("randint", "randperm") else torch.get_default_dtype()
        device = given.get("device") or (like.device if isinstance(like, Tensor) else "cpu")
        return values.to(device=device, dtype=dtype)

    # -- what each operator draws, as NumPy arrays of `size` or flat ------------------------------

    def _words(
        self, size: Sequence[int], *parts: int, by_bytes: bool = False
    ) -> list[NDArray[np.float64]]:
        number = torch.initial_seed() - _FIRST
        torch.manual_seed(_FIRST + number + 1)
        self.next = max(self.next, number + 1)
        streams = [2 * number + part for part in parts or (0,)]
        count = math.prod(size)
        return [
            words(self._seed, self._step, s, count, by_bytes).astype(np.float64) for s in streams
        ]

    def _native_dropout(self, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        x, p = given["input"], given["p"]
        if given["train"] is False:
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
        kept = self._bernoulli({"p": 1 - p}, x.shape)
        mask = torch.from_numpy(kept).reshape(x.shape).to(x.device)
        return x * mask * (0.0 if p == 1 else 1 / (1 - p)), mask

    def _bernoulli(self, given: dict[str, Any], size: Sequence[int]) -> NDArray[Any]:
        p: Any = given.get("p", given.get("self"))
        if isinstance(p, Tensor):
            chance = p.detach().cpu().double().expand(tuple(size)).numpy().ravel() * 2.0**32
            return np.asarray(self._words(size)[0] < chance)
        usual = 1 / 64 <= p <= 63 / 64
        return np.asarray(self._words(size, by_bytes=usual)[0] < round(p * 2**32))

    def _unit(self, dtype: torch.dtype, size: Sequence[int]) -> NDArray[np.float64]:
        bits = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
        if bits == 53:
            high, low = self._words(size, 0, 1)
            return np.asarray((high * 2.0**21 + low // 2**11) / 2.0**53)
        return np.asarray(self._words(size)[0] // 2 ** (32 - bits) / 2.0**bits)

    def _rand(self, given: dict[str, Any], size: Sequence[int]) -> NDArray[Any]:
        return self._unit(given.get("dtype") or torch.get_default_dtype(), size)

    def _rand_like(self, given: dict[str, Any], size: Sequence[int]) -> NDArray[Any]:
        return self._unit(given.get("dtype") or given["self"].dtype, size)

    def _uniform(self, given: dict[str, Any], size: Sequence[int]) -> NDArray[Any]:
        low, high = given["from"], given["to"]
        values: NDArray[Any] = low + (high - low) * self._unit(given["self"].dtype, size)
        rounded = torch.from_numpy(values).to(given["self"].dtype).double().numpy()
        return np.asarray(np.where((rounded < high) | (high <= low), values, low))

    def _rrelu_with_noise(self, given: dict[str, Any]) -> Tensor:
        x: Tensor = given["self"]
        low, high = float(given["lower"]), float(given["upper"])
        if not given["training"]:
            return torch.where(x > 0, x, x * (low + high) / 2)
        slope = torch.from_numpy(low + (high - low) * self._unit(x.dtype, x.shape))
        given["noise"].copy_(torch.where(x > 0, 1.0, slope.to(x).reshape(x.shape)))
        noise: Tensor = given["noise"]
        return x * noise

    def _gaussian(self, size: Sequence[int]) -> NDArray[Any]:
        u, v = self._words(size, 0, 1)
        radius = np.sqrt(-2 * np.log((u + 0.5) / 2.0**32))
        return np.asarray(radius * np.cos(2 * np.pi * v / 2.0**32))

    def _randn(self, given: dict[str, Any], size: Sequence[int]) -> NDArray[Any]:
        return self._gaussian(size)

    _randn_like = _randn

    def _normal(self, given: dict[str, Any], size: Sequence[int]) -> NDArray[Any]:
        mean, std = (
            v.detach().cpu().double().expand(tuple(size)).numpy().ravel()
            if isinstance(v, Tensor)
            else v
            for v in (given["mean"], given["std"])
        )
        return np.asarray(mean + std * self._gaussian(size))

    def _exponential(self, given: dict[str, Any], size: Sequence[int]) -> NDArray[Any]:
        return np.asarray(-np.log((self._words(size)[0] + 0.5) / 2.0**32) / given["lambd"])

    def _bits(self, size: Sequence[int]) -> NDArray[np.int64]:
        high, low = (w.astype(np.int64) for w in self._words(size, 0, 1))
        return np.asarray(high * 2**31 + low // 2)

    def _randint(self, given: dict[str, Any], size: Sequence[int]) -> NDArray[Any]:
        low = int(given.get("low") or 0)
        return low + self._bits(size) % (int(given["high"]) - low)

    _randint_like = _randint

    def _random(self, given: dict[str, Any], size: Sequence[int]) -> NDArray[Any]:
        dtype = given["self"].dtype
        if dtype.is_floating_point:
            top = int(2 / torch.finfo(dtype).eps) + 1
        else:
            top = 2 if dtype == torch.bool else min(torch.iinfo(dtype).max, 2**63 - 2) + 1
        low = given.get("from") or 0
        high = given.get("to")
        return low + self._bits(size) % ((top if high is None else high) - low)

    def _randperm(self, given: dict[str, Any], size: Sequence[int]) -> NDArray[Any]:
        return np.argsort(self._bits(size), kind="stable")
