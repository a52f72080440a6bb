"""One small step in several variants, for the tests of the targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export.runtime.detect import target_status

TARGETS = ["onnx", "onnx-training", "ort-artifacts", "torch-compile", "torchscript", "aot-inductor"]

RUN_HERE = [target for target in TARGETS if not target_status(target).run]
"""Those that this environment can run; `conftest.py` skips the tests of the others."""


class Small(nn.Module):
    """A convolution, BatchNorm and pooling; a tied scalar so that a state tensor has no size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))) * self.scale
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


def images(count: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * count + seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return torch.randn(count, 1, 4, 4, generator=generator, dtype=dtype), labels


def make(dtype: torch.dtype, base: str, **semantics: Any) -> sx.TrainStep:
    torch.manual_seed(0)
    model = Small().to(dtype)
    bases: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
        "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.05}),
    }
    sam = sx.SAM(model.parameters(), bases[base][0], rho=0.05, **bases[base][1])
    return sx.TrainStep(model, nn.CrossEntropyLoss(), sam, semantics=sx.Semantics(**semantics))
