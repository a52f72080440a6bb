"""The rounding of a plain loop's sums, added to what eager's kernels compute.

Some of eager's kernels add in pieces: of 50,000 float32 terms of 0.1, its sum loses 0.0005, its
BatchNorm, which adds each example's pixels by themselves, 0.004, and a loop that adds one term
after the other 2.5. A compiler writes that loop, in the model's own dtype (Inductor does, over a
batch of symbolic size and any number of pixels).
Where neighbouring terms are equal, as in the gradient of a mean over pixels, the roundings of such
a loop are equal too and add up, and no disturbance of weights and inputs shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Given = Mapping[str, Any]
"""An operator's arguments by their names in its schema."""


class OneByOne(TorchDispatchMode):
    """While it is active, sums over examples and pixels round as a plain loop's do.

    Each operator's result is eager's own, plus what a loop over the same terms gets wrong, carried
    through to the results that hold the sum. So a mistake in here is of the size of a rounding,
    too, and cannot make the floor so wide that a wrong step fits in. Sums and means, the sums of
    BatchNorm and GroupNorm, and losses are done. The gradients of a convolution's bias and of
    LayerNorm's weights are not, since eager adds them by such a loop itself; nor matrix products
    (every BLAS blocks them in its dtype, eager's as well), norms of gradients (of fixed length,
    which compilers split into pieces), and other devices than the CPU (their sums are trees).
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operator of torch."""
        result = func(*args, **(kwargs or {}))
        round_as_loop = _OPERATORS.get(func.overloadpacket)
        if round_as_loop is None:
            return result
        given = {a.name: a.default_value for a in func._schema.arguments}
        given |= dict(zip(given, args, strict=False)) | (kwargs or {})
        values = (result,) if isinstance(result, Tensor) else result
        if not any(v is not None and v.is_floating_point() and v.is_cpu for v in values):
            return result
        with torch.no_grad():
            round_as_loop(func, given, result)
        return result


def lost(terms: Tensor, dims: Sequence[int]) -> Tensor:
    """What a loop over ``dims``, the last one innermost, gets wrong; those stay with size 1.

    The loop adds in the terms' dtype, or in float32 if that is wider.
    """
    dims = sorted(d % terms.dim() for d in dims)
    if not terms.numel():
        return torch.zeros((), dtype=torch.float64)
    if terms.dtype in (torch.float16, torch.bfloat16):
        terms = terms.float()
    kept = [d for d in range(terms.dim()) if d not in dims]
    shape = [1 if d in dims else size for d, size in enumerate(terms.shape)]
    count = int(np.prod([terms.shape[d] for d in dims], dtype=np.int64))
    rows = np.ascontiguousarray(terms.permute(*dims, *kept).numpy()).reshape(count, -1)
    with np.errstate(all="ignore"):  # a batch that is not finite
        # A sum along the only axis would be pairwise.
        loop = rows.sum(axis=0) if rows.shape[1] > 1 else np.add.accumulate(rows, axis=0)[-1]
    exact = terms.double().sum(dims, keepdim=True)
    return torch.from_numpy(loop).double().reshape(shape) - exact


def _sum(func: Any, given: Given, result: Tensor) -> None:
    terms = given["self"] if given["dtype"] is None else given["self"].to(given["dtype"])
    error = lost(terms, _dims(given))
    result += error.reshape(result.shape).to(result.dtype)


def _mean(func: Any, given: Given, result: Tensor) -> None:
    terms = given["self"] if given["dtype"] is None else given["self"].to(given["dtype"])
    count = terms.numel() / max(result.numel(), 1)
    result += (lost(terms, _dims(given)) / count).reshape(result.shape).to(result.dtype)


def _dims(given: Given) -> Sequence[int]:
    dims = given.get("dim")
    return dims if dims else range(given["self"].dim())


def _loss(func: Any, given: Given, result: Any) -> None:
    """A loss of the kind that can also give its terms."""
    if given["reduction"] == 0:
        return
    terms = func(**{**given, "reduction": 0})
    value, divisor = result, None
    if isinstance(result, tuple):  # the loss, and the weight that it was divided by
        terms, (value, divisor) = terms[0], result
    error = lost(terms, range(terms.dim()))
    if given["reduction"] == 1:
        error = error / (terms.numel() if divisor is None else divisor)
    value += error.reshape(()).to(value.dtype)


def _batch_norm(func: Any, given: Given, result: Sequence[Tensor]) -> None:
    if not given["training"]:
        return
    (y, mean, invstd), x = result, given["input"]
    count = x.numel() // x.shape[1]
    dims, of_mean, of_std = _channels(x), _spread(mean, x), _spread(invstd, x)
    centered = x - of_mean
    in_mean = lost(x, dims) / count
    in_variance = lost(centered * centered, dims) / count
    slope = of_std if given["weight"] is None else of_std * _spread(given["weight"], x)
    y -= (slope * (in_mean + centered * of_std * of_std * in_variance / 2)).to(y.dtype)
    in_mean, in_variance = in_mean.flatten(), in_variance.flatten()
    mean += in_mean.to(mean.dtype)
    invstd -= (invstd**3 * in_variance / 2).to(invstd.dtype)
    if given["running_mean"] is not None:
        momentum = given["momentum"]
        given["running_mean"].add_(in_mean.to(mean.dtype), alpha=momentum)
        unbiased = in_variance * count / max(count - 1, 1)
        given["running_var"].add_(unbiased.to(invstd.dtype), alpha=momentum)


def _batch_norm_backward(func: Any, given: Given, result: Sequence[Tensor | None]) -> None:
    x, g = given["input"], given["grad_out"]
    count = x.numel() // x.shape[1]
    if given["train"]:
        mean, invstd = given["save_mean"], given["save_invstd"]
    else:
        mean, invstd = given["running_mean"], (given["running_var"] + given["eps"]).rsqrt()
    normalized = (x - _spread(mean, x)) * _spread(invstd, x)
    in_bias = lost(g, _channels(x))
    in_weight = lost(g * normalized, _channels(x))
    slope = _spread(invstd, x)
    if given["weight"] is not None:
        slope = slope * _spread(given["weight"], x)
    if result[0] is not None and given["train"]:
        result[0].sub_((slope * (in_bias + normalized * in_weight) / count).to(x.dtype))
    _add(result[1], in_weight)
    _add(result[2], in_bias)


def _group_norm_backward(func: Any, given: Given, result: Sequence[Tensor | None]) -> None:
    x, g = given["input"], given["grad_out"]
    groups = x.reshape(x.shape[0], given["group"], -1)
    normalized = (groups - given["mean"].unsqueeze(-1)) * given["rstd"].unsqueeze(-1)
    _add(result[1], lost(g * normalized.reshape(x.shape), _channels(x)))
    _add(result[2], lost(g, _channels(x)))


def _channels(x: Tensor) -> list[int]:
    """All dimensions but that of the channels."""
    return [d for d in range(x.dim()) if d != 1]


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """One value per channel, in a shape that broadcasts over ``x``."""
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def _add(gradient: Tensor | None, error: Tensor) -> None:
    if gradient is not None and gradient.numel():
        gradient += error.reshape(gradient.shape).to(gradient.dtype)


_aten = torch.ops.aten
_OPERATORS: dict[Any, Callable[[Any, Given, Any], None]] = {
    _aten.sum: _sum,
    _aten.mean: _mean,
    _aten.nll_loss_forward: _loss,
    _aten.nll_loss2d_forward: _loss,
    _aten.mse_loss: _loss,
    _aten.smooth_l1_loss: _loss,
    _aten.huber_loss: _loss,
    _aten.native_batch_norm: _batch_norm,
    _aten.native_batch_norm_backward: _batch_norm_backward,
    _aten.native_group_norm_backward: _group_norm_backward,
}
