"""The table of operators: for each that we treat, calls of it, each with its gradients.

A row is a call. Its outputs and the gradients of all its floating-point inputs are compared with
ATen's own, in each of its dtypes (`test_op_table.py`). An operator that only comes up in a backward
pass is tested by the row of its forward operator.

To add an operator: a function in ``sam_export/lower/onnx_ops/`` and a row here;
``docs/add_an_op.md`` walks through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.lower.onnx_cases import TOLERANCE, randn

FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Row:
    """One call of an operator.

    Attributes:
        op: The operator, as ATen names it, and what is special about the call.
        call: The function of the inputs that is compared, forward and backward.
        inputs: Values, in float64; floating-point ones are cast to each dtype.
        dtypes: To run in.
        tolerance: Of the largest element; other than the usual one only with ``why``.
        why: Where another tolerance comes from.
        gap: Why it is known not to work; such a row is expected to fail.
        covers: Other operators that the call runs into.
    """

    op: str
    call: Callable[..., Any]
    inputs: Sequence[Tensor]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    tolerance: dict[torch.dtype, float] = field(default_factory=lambda: TOLERANCE)
    why: str = ""
    gap: str = ""
    covers: tuple[str, ...] = ()


def _x(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).double()


def _ties(*shape: int) -> Tensor:
    return (_x(*shape) * 2).round()


def _integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


_NAN = torch.tensor([[1.0, math.nan, 3.0, 2.0], [4.0, 0.5, -1.0, math.nan], [3.0, 1.0, 2.0, 5.0]])

NORMS = [
    Row(f"linalg_vector_norm, ord {p}, dim {dim}", lambda x, p=p, dim=dim, keep=keep:
        torch.linalg.vector_norm(x, p, dim, keep), [_x(3, 4, 5)])
    for p in (2, 1, 0, 0.5, 3, math.inf, -math.inf, -1)
    for dim, keep in ((None, False), (1, True), ([0, 2], False))
] + [
    Row("linalg_vector_norm of a scalar", lambda x: torch.linalg.vector_norm(x, 2, 0), [_x()]),
    Row("linalg_vector_norm, dtype", lambda x: torch.linalg.vector_norm(x, 1, dtype=torch.float64),
        [_x(7)]),
    Row("renorm", lambda x: torch.renorm(x, 2, 0, 0.7), [_x(4, 5)]),
    Row("normalize", lambda x: F.normalize(x, dim=1), [_x(4, 5)]),
]  # fmt: skip

SCATTER = [
    Row("scatter.src, larger than the index", lambda x, i, s: x.scatter(1, i, s.detach()),
        [_x(3, 5), _integers(2, 3, 1), _x(3, 2)]),
    Row("scatter.src", lambda x, i, s: x.scatter(0, i, s),
        [_x(3, 5), torch.tensor([[0, 1, 2, 0]]), _x(1, 4, seed=1)]),
    Row("scatter.value", lambda x, i: x.scatter(0, i, 0.3), [_x(4, 3), _integers(4, 1, 3)]),
    Row("scatter.src, a scalar", lambda x, i, s: x.scatter(0, i, s),
        [_x(), torch.tensor(0), _x(seed=1)]),
    Row("scatter_add", lambda x, i, s: x.scatter_add(1, i, s),
        [_x(3, 5), _integers(5, 3, 4), _x(3, 4, seed=1)]),
    Row("scatter_add, a scalar", lambda x, i, s: x.scatter_add(0, i, s),
        [_x(), torch.tensor(0), _x(seed=1)]),
    Row("scatter.reduce", lambda x, i, s: x.detach().scatter(
        0, i, s.detach(), reduce="multiply"),
        [_x(4, 3), _integers(4, 4, 3), _x(4, 3, seed=1)]),
    Row("scatter.value_reduce", lambda x, i: x.detach().scatter(0, i, 0.3, reduce="add"),
        [_x(4, 3), _integers(4, 4, 3)]),
    Row("gather of a scalar", lambda x, i: x.gather(0, i), [_x(), torch.tensor(0)]),
    *(
        Row(f"scatter_reduce.two, {kind}, itself {own}", lambda x, i, s, kind=kind, own=own:
            x.scatter_reduce(1, i, s, kind, include_self=own),
            [_x(3, 5), _integers(5, 3, 4), _x(3, 4, seed=1)])
        for kind in ("sum", "prod", "mean", "amax", "amin") for own in (True, False)
    ),
    *(
        Row(f"index_reduce, {kind}", lambda x, i, s, kind=kind: x.index_reduce(0, i, s, kind),
            [_x(4, 3), _integers(4, 5), _x(5, 3, seed=1)])
        for kind in ("mean", "amax", "amin", "prod")
    ),
    Row("scatter_reduce.two of integers", lambda x, i: (
        x.scatter_reduce(0, i, x, "amax", include_self=False),
        x.scatter_reduce(0, i, x, "amin", include_self=False)),
        [_integers(9, 4) - 4, _integers(4, 4, seed=1)]),
    Row("index_reduce of a scalar", lambda x, i, s: x.index_reduce(0, i, s, "amax"),
        [_x(), torch.tensor([0]), _x(seed=1)]),
    Row("put", lambda x, s: x.put(torch.tensor([[1, -2], [4, 0]]), s), [_x(3, 4), _x(2, 2)]),
    Row("put, accumulate", lambda x, s: x.put(torch.tensor([1, 1, 4]), s, accumulate=True),
        [_x(3, 4), _x(3, seed=1)]),
    Row("masked_scatter", lambda x, s: x.masked_scatter(x > 0, s), [_x(3, 4), _x(12, seed=1)]),
    Row("as_strided_scatter", lambda x, s: torch.as_strided_scatter(x, s, (2, 3), (4, 2), 1),
        [_x(4, 4), _x(2, 3, seed=1)]),
    Row("as_strided", lambda x: x.as_strided((2, 3, 2), (1, 3, 2), 2), [_x(4, 4)]),
    Row("unfold", lambda x: x.unfold(1, 3, 2), [_x(2, 9, 3)]),
    Row("unfold of a scalar", lambda x: x.unfold(0, 1, 1), [_x()]),
    Row("repeat_interleave.Tensor",
        lambda x: x.repeat_interleave(torch.tensor([2, 0, 3]), 0, output_size=5), [_x(3, 2)]),
    Row("squeeze", lambda x: (x.squeeze(0), x.squeeze(1), x.squeeze((0, 1))), [_x(1, 3, 2)],
        covers=("view_of",)),
    Row("_efficientzerotensor", lambda x: torch.ops.aten._efficientzerotensor(
        [2, 3], dtype=x.dtype) + x.detach(), [_x(3)]),
    Row("block_diag", lambda x, y: torch.block_diag(x, y), [_x(3), _x(2, 2, seed=1)]),
]  # fmt: skip

SCANS = [
    Row("cumprod", lambda x: x.cumprod(1), [_x(3, 6)]),
    Row("cumprod with a zero", lambda x: (x * (x.abs() > 0.4)).cumprod(0), [_x(6, 3)]),
    Row("cumprod of a scalar", lambda x: x.cumprod(0), [_x()]),
    Row("logcumsumexp", lambda x: (x * 50).logcumsumexp(1), [_x(3, 7)],
        tolerance={torch.float32: 2e-4, torch.float64: 1e-12},
        why="exp of differences of numbers near 100: 100 eps = 1e-5, summed over seven"),
    Row("logcumsumexp of a scalar", lambda x: x.logcumsumexp(0), [_x()]),
    Row("logaddexp", lambda x, y: torch.logaddexp(x * 200, y * 200), [_x(5), _x(5, seed=1)],
        tolerance={torch.float32: 2e-4, torch.float64: 1e-12},
        why="exp of differences of numbers near 200: 200 eps = 2e-5 in the gradient"),
    Row("logaddexp2", lambda x, y: torch.logaddexp2(x, y), [_x(5), _x(5, seed=1)]),
    Row("cummax of a scalar", lambda x: x.cummax(0), [_x()]),
    Row("prod", lambda x: (x.prod(), x.prod(1), x.prod(0, keepdim=True)), [_x(3, 5)]),
    Row("prod with zeros", lambda x: ((x * (x.abs() > 0.4)).prod(), x.prod(1)), [_x(3, 5)]),
    Row("products of integers", lambda i: (i.cumprod(0), i.prod(0), i.prod()),
        [torch.tensor([2**20, 2**20, 3], dtype=torch.int32)]),
    Row("prod of a scalar", lambda x: x.prod(0), [_x()]),
    Row("prod, dtype", lambda x: x.prod(1, dtype=torch.float32), [_x(3, 4)],
        dtypes=(torch.float32,)),
]  # fmt: skip

SELECTION = [
    Row("where", lambda x, y: torch.where(x > 0, x, y), [_x(3, 5), _x(5, seed=1)]),
    Row(
        "where of bool",
        lambda x, y: torch.where(x > 0, x > 1, y > 0).to(x) * x,
        [_x(3, 5), _x(5, seed=1)],
    ),
    Row("median", lambda x: x.median(), [_x(3, 5)]),
    Row("median.dim", lambda x: x.median(1), [_x(3, 6)]),
    Row("median.dim with NaN", lambda x: x.detach().median(1, True), [_NAN.double()]),
    Row("median of a scalar", lambda x: x.median(0), [_x()]),
    Row("nanmedian", lambda x: x.nanmedian(), [_NAN.double()]),
    Row("nanmedian.dim", lambda x: x.nanmedian(1), [_NAN.double()]),
    Row("nanmedian of a scalar", lambda x: x.nanmedian(0), [_x()]),
    Row(
        "nanmedian with infinities",
        lambda x: x.detach().nanmedian(1),
        [
            torch.tensor(
                [[math.nan, math.inf, math.nan], [math.nan] * 3, [math.inf, -math.inf, math.nan]]
            )
        ],
    ),
    Row(
        "order statistics of integers",
        lambda i: (*i.median(0), *i.nanmedian(0), *i.mode(0)),
        [_integers(4, 7, 3)],
    ),
    Row("mode", lambda x: x.mode(1), [_ties(4, 7)]),
    Row("mode of a scalar", lambda x: x.mode(0), [_x()]),
    Row("kthvalue of a scalar", lambda x: x.kthvalue(1), [_x()]),
    Row("topk", lambda x: x.topk(2, 0, largest=False), [_x(5, 3)]),
    Row("topk of a scalar", lambda x: x.topk(1), [_x()]),
    Row("max.dim", lambda x: x.max(1), [_ties(3, 6)]),
    Row("min.dim", lambda x: x.min(0, True), [_x(5, 3)]),
    Row("max.dim of a scalar", lambda x: x.max(0), [_x()]),
    Row("max.dim of bool", lambda x: (x.detach() > 0).max(1), [_x(3, 4)]),
    Row("amax", lambda x: (x.amax(1), x.amax(), x.amax((0, 1), True)), [_ties(3, 4)]),
    Row("amin", lambda x: (x.amin(0), x.amin()), [_ties(3, 4)]),
    Row("amax of a scalar", lambda x: x.amax(0), [_x()]),
]

_GAMMA_AT = torch.tensor([-2.7, -1.2, -0.3, 0.2, 0.49, 0.51, 1.3, 2.9, 7.5, 40.0])
_CANCELS = {torch.float32: 1e-4, torch.float64: 1e-12}
_TRIGAMMA = {torch.float32: 1e-4, torch.float64: 1e-9}
_ROUGH = "ATen's own trigamma stops after three terms of the expansion: right to 1e-10"
_INSIDE = torch.tensor([-0.99, -0.5, -1e-3, 1e-6, 0.3, 0.97]).double()

ELEMENTWISE = [
    Row("lgamma", torch.lgamma, [_GAMMA_AT.double()], tolerance=_CANCELS,
        why="the reflection's tangent near its pole, of a rounded argument"),
    Row("digamma", torch.digamma, [_GAMMA_AT.double()], tolerance=_TRIGAMMA, why=_ROUGH),
    *(
        Row(f"polygamma {n}", lambda x, n=n: torch.polygamma(n, x), [_GAMMA_AT.double()[2:]],
            tolerance=_TRIGAMMA, why=_ROUGH)
        for n in (0, 1, 2, 3)
    ),
    Row("digamma at its poles", lambda x: torch.digamma(x.detach()),
        [torch.tensor([0.0, -0.0, -1.0, 1.0]).double()]),
    Row("special_erfcx", torch.special.erfcx, [torch.linspace(-3, 30, 40).double()],
        covers=("erfcx",)),
    Row("special_log_ndtr", torch.special.log_ndtr, [torch.linspace(-40, 6, 40).double()]),
    Row("erfc", torch.erfc, [torch.linspace(-3, 9, 40).double()]),
    Row("lgamma of large numbers", torch.lgamma, [torch.tensor([9.0, 1e3, 7e4, 1e6]).double()]),
    Row("hypot", torch.hypot, [torch.tensor([3.0, -2.0, 1e-3, 5.0]).double(),
                               torch.tensor([4.0, 1.0, 1e-4, -9.0]).double()]),
    Row("hypot of large numbers", lambda x, y: torch.hypot(x, y), [
        torch.tensor([3e30, 1e-30]).double(), torch.tensor([4e30, 1e-30]).double()]),
    *(
        Row(name, getattr(torch, name), [_x(30) * 2]) for name in
        ("expm1", "cos", "sin", "tan", "cosh", "sinh", "tanh", "atan", "asinh")
    ),
    Row("log1p", lambda x: torch.log1p(x.exp() * 1e-6), [_x(20) * 3]),
    Row("expm1 of small numbers", lambda x: torch.expm1(x * 1e-5), [_x(20)]),
    *(Row(name, getattr(torch, name), [_INSIDE]) for name in ("asin", "acos", "atanh")),
    Row("acosh", torch.acosh, [torch.tensor([1.001, 1.5, 3.0, 40.0]).double()]),
    Row("atan2", torch.atan2, [_x(20), _x(20, seed=1)]),
    Row("linspace", lambda x: x + torch.linspace(0, 1 / 3, 7, dtype=x.dtype), [_x(7)]),
    Row("signbit", lambda x: torch.signbit(x.detach()), [torch.tensor([-1.0, -0.0, 0.0, 2.0])]),
    Row("copysign of a number", lambda x: torch.copysign(x, -2.0), [_x(6)]),
    Row("copysign", lambda x, y: torch.copysign(x, y), [_x(6), _x(6, seed=1)]),
    Row("silu", F.silu, [_x(40) * 3]),
    Row("mish", F.mish, [_x(40) * 3]),
    Row("hardshrink", F.hardshrink, [_x(40)]),
    Row("softshrink", F.softshrink, [_x(40)]),
    Row("replication_pad1d", lambda x: F.pad(x, (2, 1), "replicate"), [_x(2, 3, 5)]),
    Row("replication_pad2d", lambda x: F.pad(x, (2, -1, -2, 1), "replicate"), [_x(2, 3, 5, 6)]),
    Row("replication_pad3d", lambda x: F.pad(x, (1, 0, 2, 1, 0, 1), "replicate"),
        [_x(1, 2, 3, 4, 5)]),
    Row("_trilinear", lambda x, y, w: F.bilinear(x, y, w), [_x(4, 3), _x(4, 2), _x(5, 3, 2)]),
    Row("clamp, an int beside a float", lambda x: torch.clamp(x, -0.5, 1), [_x(3, 4)]),
]  # fmt: skip

_SCORES = _x(4, 5)
_CLASSES = torch.tensor([1, 0, 4, 2])

LOSSES = [
    *(
        Row(f"multi_margin_loss, p {p}, {reduction}", lambda x, w, p=p, reduction=reduction:
            F.multi_margin_loss(x, _CLASSES, p, 0.7, w.detach(), reduction=reduction),
            [_SCORES, _x(5, seed=1).exp()])
        for p in (1, 2) for reduction in ("none", "mean", "sum")
    ),
    Row("multi_margin_loss of one", lambda x: F.multi_margin_loss(x, torch.tensor(1)), [_x(5)]),
    *(
        Row(f"_pdist_forward, p {p}", lambda x, p=p: F.pdist(x, p), [_x(5, 3)],
            covers=("_pdist_backward",))
        for p in (0.0, 1.0, 1.5, 2.0, math.inf)
    ),
]  # fmt: skip

_IMAGE, _VOLUME = _x(2, 3, 5, 6), _x(2, 2, 3, 4, 5)
_GRID = _x(2, 4, 3, 2, seed=1) * 0.9
_GRID_3D = _x(2, 2, 3, 2, 3, seed=1) * 0.9

GRIDS = [
    Row(f"grid_sampler_2d, {mode}, {padding}, align {align}",
        lambda x, g, mode=mode, padding=padding, align=align:
        F.grid_sample(x, g, mode, padding, align), [_IMAGE, _GRID])
    for mode in ("bilinear", "nearest", "bicubic") for padding in ("zeros", "border", "reflection")
    for align in (False, True)
] + [
    Row(f"grid_sampler_3d, {mode}, {padding}", lambda x, g, mode=mode, padding=padding:
        F.grid_sample(x, g, mode, padding, False), [_VOLUME, _GRID_3D])
    for mode in ("bilinear", "nearest") for padding in ("zeros", "border", "reflection")
] + [
    Row("grid_sampler_2d of one pixel", lambda x, g: F.grid_sample(x, g, "bilinear", "reflection",
        True), [_x(1, 2, 1, 1), _x(1, 2, 2, 2)]),
]  # fmt: skip

_INDICES, _OFFSETS = torch.tensor([1, 4, 4, 2, 0, 3, 2]), torch.tensor([0, 3, 3, 7])

BAGS = [
    Row(f"_embedding_bag, {mode}, {options}", lambda w, mode=mode, options=options:
        F.embedding_bag(_INDICES, w, _OFFSETS, mode=mode, **options), [_x(5, 3)])
    for mode in ("sum", "mean", "max")
    for options in ({}, {"padding_idx": 4}, {"include_last_offset": True})
] + [
    Row("_embedding_bag, scale_grad_by_freq", lambda w: F.embedding_bag(
        _INDICES, w, _OFFSETS, mode="sum", scale_grad_by_freq=True), [_x(5, 3)],
        gap="refused: PyTorch's own gradient on the CPU divides by the counts of other indices"),
    Row("_embedding_bag, per-sample weights", lambda w, s: F.embedding_bag(
        _INDICES, w, _OFFSETS, mode="sum", per_sample_weights=s, padding_idx=2),
        [_x(5, 3), _x(7, seed=1)], covers=("_embedding_bag_per_sample_weights_backward",)),
    Row("_embedding_bag_forward_only", lambda w: F.embedding_bag(_INDICES, w.detach(), _OFFSETS),
        [_x(5, 3)]),
    Row("_embedding_bag of a matrix", lambda w: F.embedding_bag(_INDICES[:6].view(2, 3), w),
        [_x(5, 3)]),
]  # fmt: skip

POOLS = [
    Row(f"max_pool{n}d_with_indices, {name}", lambda x, n=n, options=options:
        getattr(F, f"max_pool{n}d")(x, *options), [x])
    for n, x in ((2, _x(2, 3, 6, 8)), (3, _x(2, 3, 4, 6, 5)), (2, _x(3, 6, 8)), (3, _x(3, 4, 6, 5)))
    for name, options in (
        (f"rank {x.dim()}, tiling", (2,)), (f"rank {x.dim()}, overlapping", (3, 2, 1)),
    )
] + [
    Row(f"adaptive_max_pool{n}d_backward, rank {x.dim()}", lambda x, n=n:
        getattr(F, f"adaptive_max_pool{n}d")(x, 3), [x])
    for n, x in ((2, _x(2, 3, 6, 8)), (3, _x(2, 3, 4, 6, 5)), (2, _x(3, 6, 8)), (3, _x(3, 4, 6, 5)))
] + [
    Row("_native_batch_norm_legit_functional, in evaluation, all results", lambda x, m, v:
        torch.ops.aten._native_batch_norm_legit_functional(
            x.detach(), m.detach(), v.detach(), m.detach(), v.detach(), False, 0.1, 1e-3
        )[0::3], [_x(4, 3, 5), _x(3), _x(3, seed=1).exp()]),
]  # fmt: skip

GROUP_NORMS = [
    Row(f"native_group_norm, {groups} groups, shape {list(x.shape)}{', plain' * (not affine)}",
        lambda x, w, b, groups=groups, affine=affine:
            F.group_norm(x, groups, *((w, b) if affine else ()), eps=1e-3) + 0 * (w + b).sum(),
        [x, _x(x.shape[1], seed=1), _x(x.shape[1], seed=2)])
    for groups, x in ((2, _x(3, 4, 5, 6)), (4, _x(3, 4, 5)), (1, _x(2, 6, 3, 2, 4)), (3, _x(4, 6)))
    for affine in (True, False)
] + [
    Row("native_group_norm, all results", lambda x, w:
        torch.ops.aten.native_group_norm(x, w, None, 3, 4, 30, 2, 1e-5), [_x(3, 4, 5, 6), _x(4)]),
]  # fmt: skip

TABLE: dict[str, list[Row]] = {
    "norms": NORMS,
    "scatter": SCATTER,
    "scans": SCANS,
    "selection": SELECTION,
    "elementwise": ELEMENTWISE,
    "losses": LOSSES,
    "grids": GRIDS,
    "bags": BAGS,
    "pools": POOLS,
    "group_norms": GROUP_NORMS,
}
