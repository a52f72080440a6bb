"""Small random models with everything that a step of theirs needs, as plain data.

A `Case` prints as the expression that makes it again, so a failure can be reproduced by one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import sam_export as sx

WIDTH = 6
"""Features, or channels, between all layers."""

SIDE = 8
"""Pixels of an image, before pooling."""

TOKENS, WORDS = 5, 11

OUTPUTS = 3

ACTIVATIONS: dict[str, Any] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "elu": nn.ELU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
}

VECTOR: dict[str, Any] = {
    **ACTIVATIONS,
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "linear_no_bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "batch_norm": lambda: nn.BatchNorm1d(WIDTH),
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "dropout": lambda: nn.Dropout(0.3),
    "residual": lambda: Residual(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())),
}

IMAGE: dict[str, Any] = {
    **ACTIVATIONS,
    "conv": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
    "conv_no_bias": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
    "conv_1x1": lambda: nn.Conv2d(WIDTH, WIDTH, 1),
    "conv_grouped": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH),
    "conv_dilated": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=2, dilation=2),
    "batch_norm": lambda: nn.BatchNorm2d(WIDTH),
    "group_norm": lambda: nn.GroupNorm(2, WIDTH),
    "instance_norm": lambda: nn.InstanceNorm2d(WIDTH, affine=True),
    "max_pool": lambda: nn.MaxPool2d(2),
    "avg_pool": lambda: nn.AvgPool2d(2),
    "dropout": lambda: nn.Dropout(0.3),
    "dropout_2d": lambda: nn.Dropout2d(0.3),
    "residual": lambda: Residual(nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Tanh())),
}

SEQUENCE: dict[str, Any] = {
    **ACTIVATIONS,
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "dropout": lambda: nn.Dropout(0.3),
    "attention": lambda: Residual(Attention()),
    "residual": lambda: Residual(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())),
}

LAYERS = {"vector": VECTOR, "image": IMAGE, "sequence": SEQUENCE}

LOSSES: dict[str, tuple[Any, str]] = {
    "cross_entropy": (nn.CrossEntropyLoss(), "class"),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), "class"),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), "class"),
    "mse": (nn.MSELoss(), "number"),
    "smooth_l1": (nn.SmoothL1Loss(), "number"),
    "huber": (nn.HuberLoss(delta=0.5), "number"),
    "bce": (nn.BCEWithLogitsLoss(), "share"),
}
"""Name to the loss and what its targets are."""

SGD, ADAM, ADAMW, RMSPROP = "SGD", "Adam", "AdamW", "RMSprop"

OPTIONS: dict[str, dict[str, list[Any]]] = {
    SGD: {"lr": [0.01, 0.05], "momentum": [0.0, 0.9], "weight_decay": [0.0, 1e-2]},
    ADAM: {"lr": [1e-3, 1e-2], "weight_decay": [0.0, 1e-2], "amsgrad": [False, True],
           "betas": [(0.9, 0.999), (0.8, 0.95)]},
    ADAMW: {"lr": [1e-3, 1e-2], "weight_decay": [0.0, 1e-2, 0.1], "amsgrad": [False, True]},
    RMSPROP: {"lr": [1e-3, 3e-3], "momentum": [0.0, 0.9], "centered": [False, True],
              "weight_decay": [0.0, 1e-2]},
}  # fmt: skip


class Residual(nn.Module):
    """``x + inner(x)``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return x + self.inner(x)


class Attention(nn.Module):
    """Two heads of attention over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [batch, TOKENS, WIDTH]."""
        parts = self.qkv(x).reshape(x.shape[0], TOKENS, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return self.out(mixed.transpose(1, 2).reshape(x.shape[0], TOKENS, WIDTH))


class Stack(nn.Module):
    """A first layer to `WIDTH` features, layers by name, a mean over places, a last layer."""

    def __init__(self, form: str, layers: tuple[str, ...]) -> None:
        super().__init__()
        self.form = form
        self.first: nn.Module = {
            "vector": lambda: nn.Linear(4, WIDTH),
            "image": lambda: nn.Conv2d(2, WIDTH, 3, padding=1),
            "sequence": lambda: nn.Embedding(WORDS, WIDTH),
        }[form]()
        self.layers = nn.Sequential(*(LAYERS[form][name]() for name in layers))
        self.last = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [batch, OUTPUTS]."""
        h = self.layers(self.first(x))
        if self.form == "image":
            h = h.mean(dim=(2, 3))
        elif self.form == "sequence":
            h = h.mean(dim=1)
        outputs: Tensor = self.last(h)
        return outputs


@dataclass(frozen=True)
class Case:
    """A model, its loss, its optimizer and its batches."""

    form: str
    layers: tuple[str, ...]
    loss: str
    optimizer: str
    options: tuple[tuple[str, Any], ...]
    two_groups: bool
    rho: float
    semantics: tuple[tuple[str, Any], ...]
    sizes: tuple[int, ...]
    dtype: str
    seed: int

    def step(self) -> sx.TrainStep:
        """The right step."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = Stack(self.form, self.layers).to(getattr(torch, self.dtype))
        options = dict(self.options)
        groups: Any = model.parameters()
        if self.two_groups:
            groups = [
                {"params": [*model.first.parameters(), *model.layers.parameters()]},
                {"params": model.last.parameters(), "lr": options["lr"] / 2, "rho": self.rho * 2},
            ]
        optimizer = sx.SAM(groups, getattr(torch.optim, self.optimizer), rho=self.rho, **options)
        semantics = sx.Semantics(**dict(self.semantics))
        return sx.TrainStep(model, LOSSES[self.loss][0], optimizer, 1, semantics, seed=self.seed)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """One of each size."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        dtype = getattr(torch, self.dtype)
        kind = LOSSES[self.loss][1]
        batches = []
        for size in self.sizes:
            if self.form == "sequence":
                x = torch.randint(WORDS, (size, TOKENS), generator=generator)
            else:
                shape = (4,) if self.form == "vector" else (2, SIDE, SIDE)
                x = torch.randn(size, *shape, generator=generator).to(dtype)
            if kind == "class":
                y = torch.randint(OUTPUTS, (size,), generator=generator)
            elif kind == "number":
                y = torch.randn(size, OUTPUTS, generator=generator).to(dtype)
            else:
                y = torch.rand(size, OUTPUTS, generator=generator).to(dtype)
            batches.append((x, y))
        return batches


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any case; what is excluded has no well-defined rounding noise.

    A normalization over examples needs some: of two values it makes +1 and -1 whatever they are,
    so the loss hardly depends on what comes before it. Pooling needs pixels.
    """
    form = draw(st.sampled_from(list(LAYERS)))
    names = draw(st.lists(st.sampled_from(list(LAYERS[form])), min_size=1, max_size=5))
    pools = 0
    layers = []
    for name in names:
        pools += name in ("max_pool", "avg_pool")
        if pools <= 1 or name not in ("max_pool", "avg_pool"):
            layers.append(name)
    optimizer = draw(st.sampled_from(list(OPTIONS)))
    options = {key: draw(st.sampled_from(values)) for key, values in OPTIONS[optimizer].items()}
    if optimizer == SGD and options["momentum"]:
        options["nesterov"] = draw(st.booleans())
    semantics = {
        "running_stats": draw(st.sampled_from(["ascent", "both"])),
        "randomness": draw(st.sampled_from(["same", "fresh"])),
        "decay_in_ascent": draw(st.booleans()),
    }
    return Case(
        form=form,
        layers=tuple(layers),
        loss=draw(st.sampled_from(list(LOSSES))),
        optimizer=optimizer,
        options=tuple(options.items()),
        two_groups=draw(st.booleans()),
        rho=draw(st.sampled_from([0.0, 0.02, 0.05, 0.1])),
        semantics=tuple(semantics.items()),
        sizes=tuple(draw(st.lists(st.integers(6, 20), min_size=1, max_size=3))),
        dtype=draw(st.sampled_from(["float32", "float64"])),
        seed=draw(st.integers(0, 999)),
    )
