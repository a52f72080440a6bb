"""Options x targets x models: every pair of two values is in some cell, and each cell has parity.

`scripts/test-wide` runs all cells; `scripts/test` a few of them, on quick targets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from covertable import make
from torch import Tensor, nn, optim

import sam_export as sx
from sam_export.runtime.detect import target_status

OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "SGD": (optim.SGD, {"lr": 0.05, "weight_decay": 0.01}),
    "nesterov": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "dampening": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "Adam": (optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01}),
    "AdamW": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.01, "maximize": True}),
    "Adamax": (optim.Adamax, {"lr": 0.01, "weight_decay": 0.01}),
    "NAdam": (optim.NAdam, {"lr": 0.01, "weight_decay": 0.01}),
    "RAdam": (optim.RAdam, {"lr": 0.01, "weight_decay": 0.01}),
    "RMSprop": (optim.RMSprop, {"lr": 0.01, "centered": True, "weight_decay": 0.01}),
    "Adagrad": (optim.Adagrad, {"lr": 0.01, "weight_decay": 0.01}),
    "Adadelta": (optim.Adadelta, {"lr": 1.0, "base_rho": 0.8, "weight_decay": 0.01}),
    "ASGD": (optim.ASGD, {"lr": 0.05, "t0": 2.0, "weight_decay": 0.01}),
    "Rprop": (optim.Rprop, {"lr": 0.01}),
    "Adafactor": (optim.Adafactor, {"lr": 0.01, "weight_decay": 0.01}),
    "Muon": (optim.Muon, {"lr": 0.01, "weight_decay": 0.01}),
}


def softened_signs(
    parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], radii: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A user's own perturbation."""
    return {name: radii[name].to(g) * g / (g.abs() + 0.01) for name, g in gradients.items()}


CLIPPING: dict[str, dict[str, float]] = {
    "none": {},
    "norm": {"clip_norm": 0.1},
    "value": {"clip_value": 0.02},
}
VARIANTS = {
    "sam": None,
    "GSAM": sx.GSAM(),
    "FriendlySAM": sx.FriendlySAM(),
    "LookSAM": sx.LookSAM(),
}
PERTURBATIONS = {"sam": None, "ASAM": sx.ASAM(), "own": softened_signs}

FACTORS: dict[str, list[Any]] = {
    "optimizer": list(OPTIMIZERS),
    "target": [
        *("onnx", "torchscript", "torch-compile"),
        *("aot-inductor", "onnx-training", "ort-artifacts"),
    ],
    "model": ["mlp", "norms", "dropout"],
    "perturbation": list(PERTURBATIONS),
    "variant": list(VARIANTS),
    "every": [1, 3],
    "ema": [False, True],
    "parts": ["whole", "batch", "micro_batch"],
    "ascent_steps": [1, 2],
    "clipping": list(CLIPPING),
    "dtype": ["float32", "float64"],
    "norm_over": ["all", "perturbed"],
    "running_stats": ["ascent", "both"],
    "randomness": ["same", "fresh"],
    "decay_in_ascent": [False, True],
    "on_nonfinite": ["skip", "raise"],
    "groups": [1, 2],
    "dynamic": [False, True],
    "calls": ["step", "stages"],
}


ONNX = ("onnx", "onnx-training", "ort-artifacts")

IMPOSSIBLE: list[tuple[tuple[str, str], Callable[[Any, Any], bool]]] = [
    # Muon takes matrices only, and works in bfloat16.
    (("optimizer", "target"), lambda optimizer, target: optimizer == "Muon" and target in ONNX),
    (("optimizer", "model"), lambda optimizer, model: optimizer == "Muon" and model != "mlp"),
    # The stock training API writes in place, in float32.
    (("optimizer", "target"), lambda *two: two == ("ASGD", "ort-artifacts")),
    (("dtype", "target"), lambda *two: two == ("float64", "ort-artifacts")),
    # It has one training model.
    (("every", "target"), lambda every, target: every > 1 and target == "ort-artifacts"),
    (("variant", "target"), lambda *two: two == ("LookSAM", "ort-artifacts")),
    # It evaluates the weights that it trains.
    (("ema", "target"), lambda ema, target: ema and target == "ort-artifacts"),
    # A step in stages: no part of its own, one ascent, and its calls are those of a step of SAM.
    (("calls", "target"), lambda *two: two == ("stages", "ort-artifacts")),
    (("calls", "parts"), lambda *two: two == ("stages", "micro_batch")),
    (("calls", "ascent_steps"), lambda calls, n: calls == "stages" and n > 1),
    (("calls", "every"), lambda calls, every: calls == "stages" and every > 1),
    (("calls", "variant"), lambda *two: two == ("stages", "LookSAM")),
    # A variant with a memory has one direction to remember, not one for each part.
    (
        ("variant", "parts"),
        lambda variant, parts: variant in ("FriendlySAM", "LookSAM") and parts == "micro_batch",
    ),
    # What LookSAM does otherwise is between the steps of SAM; Friendly SAM has one direction.
    (("variant", "every"), lambda variant, every: variant == "LookSAM" and every == 1),
    (("variant", "ascent_steps"), lambda variant, n: variant == "FriendlySAM" and n > 1),
    # Other perturbations have their own norm; Rprop has no decay.
    (("perturbation", "norm_over"), lambda kind, norm: kind != "sam" and norm == "perturbed"),
    (("optimizer", "dynamic"), lambda optimizer, dynamic: optimizer == "Rprop" and dynamic),
]
"""Two factors, and which of their values do not go together: refused, and tested as refusals."""


def constraint(fields: tuple[str, str], forbids: Callable[[Any, Any], bool]) -> dict[str, Any]:
    one, other = fields
    return {
        "operator": "fn",
        "requires": list(fields),
        "evaluate": lambda row: not forbids(row[one], row[other]),
    }


CELLS = [
    SimpleNamespace(**row)
    for row in make(FACTORS, strength=2, constraints=[constraint(*item) for item in IMPOSSIBLE])
]


def named(cell: Any) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(vars(cell).items()))


def model_of(cell: Any) -> nn.Module:
    torch.manual_seed(0)
    if cell.model == "mlp":
        bias = cell.optimizer != "Muon"
        layers = [nn.Linear(12, 8, bias), nn.Tanh(), nn.Linear(8, 3, bias)]
    elif cell.model == "norms":
        layers = [nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.SiLU()]
        layers += [nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 3)]
    else:
        layers = [nn.Linear(12, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(getattr(torch, cell.dtype))


def step_of(cell: Any) -> sx.TrainStep:
    own = model_of(cell)
    kind, options = OPTIMIZERS[cell.optimizer]
    groups: list[dict[str, Any]] = [{"params": list(own.parameters())}]
    if cell.groups == 2:
        *rest, last = own.parameters()
        radius = 0.0 if cell.norm_over == "perturbed" else 0.02
        groups = [{"params": rest}, {"params": [last], "rho": radius, "lr": options["lr"] / 2}]
    perturbation = PERTURBATIONS[cell.perturbation]
    sam = sx.SAM(
        groups,
        kind,
        rho=0.05,
        perturbation=perturbation,
        variant=VARIANTS[cell.variant],
        every=cell.every,
        ascent_steps=cell.ascent_steps,
        **options,
    )
    semantics = sx.Semantics(
        norm_over=cell.norm_over,
        running_stats=cell.running_stats,
        randomness=cell.randomness,
        decay_in_ascent=cell.decay_in_ascent,
        on_nonfinite=cell.on_nonfinite,
        micro_batches=1 if cell.parts == "whole" else 2,
        perturbation_per="micro_batch" if cell.parts == "micro_batch" else "batch",
        **CLIPPING[cell.clipping],
    )
    return sx.TrainStep(
        own,
        nn.CrossEntropyLoss(),
        sam,
        semantics=semantics,
        seed=3,
        ema=sx.EMA(0.8) if cell.ema else None,
    )


def check(cell: Any) -> None:
    if missing := target_status(cell.target).run:
        pytest.skip(f"{cell.target} needs {missing[0].what}")
    step, dtype = step_of(cell), getattr(torch, cell.dtype)
    generator = torch.Generator().manual_seed(1)
    batches = [
        (
            torch.randn(size, 12, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for size in (8, 8, 6)
    ]
    dynamic = ["weight_decay"] if cell.dynamic else []
    is_staged = cell.calls == "stages"
    captured = sx.capture(step, batches[0], dynamic_hyper=dynamic, staged=is_staged)
    session: Any = sx.load(captured, target=cell.target)
    session = sx.InStages(session) if is_staged else session
    report = sx.check_parity(step, batches, sessions={cell.target: session}, num_steps=4)
    assert report.ok, f"{named(cell)}\n{report}"


@pytest.mark.wide
@pytest.mark.parametrize("cell", CELLS, ids=named)
def test_every_cell(cell: Any) -> None:
    check(cell)


QUICK = [cell for cell in CELLS if cell.target in ("onnx", "torchscript")][::8]


@pytest.mark.parametrize("cell", QUICK, ids=named)
def test_some_cells(cell: Any) -> None:
    check(cell)


def test_every_possible_pair_is_in_some_cell() -> None:
    """Counted by itself, pair by pair."""
    for one, other in itertools.combinations(FACTORS, 2):
        seen = {(getattr(cell, one), getattr(cell, other)) for cell in CELLS}
        for pair in itertools.product(FACTORS[one], FACTORS[other]):
            values = dict(zip((one, other), pair, strict=True))
            forbidden = any(
                set(fields) == {one, other} and forbids(*(values[field] for field in fields))
                for fields, forbids in IMPOSSIBLE
            )
            assert (pair in seen) != forbidden, (one, other, pair)
