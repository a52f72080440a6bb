"""Session-like SAM loops for testing the harness: right ones in other arithmetic, and wrong ones.

None of them shares code with the package or with its oracle: gradients come from
`torch.autograd.grad` on detached leaves, and the update rules are written out.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FAULTS = (
    "no perturbation",
    "wrong sign",
    "gradient times batch size",
    "running statistics twice",
    "momentum dropped",
    "decay dropped",
    "w not restored",
    "per-tensor norm",
    "first gradient reused",
    "stale slot",
    "swapped slots",
    "nan",
    "squared norm",
    "rho doubled",
    "other loss reported",
    "one parameter not updated",
    "frozen parameter moves",
    "float32 arithmetic",
    "momentum reset in the second step",
)
"""Every one is wrong in a model with BatchNorm, a frozen parameter, momentum and weight decay
("float32 arithmetic" only where the model is float64)."""


@dataclass
class Result:
    """The fields of `StepResult`."""

    loss: float
    perturbed_loss: float
    grad_norm: float
    perturbation_norm: float
    finite: bool


class PlainLoop:
    """SGD with momentum and weight decay under SAM, over a copy of a model.

    Args:
        model: Copied.
        rho: Radius.
        lr: Learning rate.
        momentum: Of the buffer, from the start a zero one as in a graph.
        weight_decay: Added to the descent gradient.
        fault: One of `FAULTS`, or None.
        variant: Another right arithmetic: ``"reversed"`` batch, ``"channels_last"``, or ``"split"``
            (the mean loss of two halves).
    """

    def __init__(
        self,
        model: nn.Module,
        rho: float,
        lr: float,
        momentum: float,
        weight_decay: float,
        fault: str | None = None,
        variant: str | None = None,
    ) -> None:
        assert fault is None or fault in FAULTS
        self.model = copy.deepcopy(model)
        if variant == "channels_last":
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.rho, self.lr, self.momentum, self.weight_decay = rho, lr, momentum, weight_decay
        self.fault, self.variant = fault, variant
        self.count = 0
        self.parameters = dict(self.model.named_parameters())
        self.buffers = dict(self.model.named_buffers())
        self.trained = [name for name, p in self.parameters.items() if p.requires_grad]
        self.slots = {name: torch.zeros_like(self.parameters[name]) for name in self.trained}

    @property
    def state(self) -> dict[str, Any]:
        """Copies, as `Session.state` gives them."""
        named: dict[str, Tensor] = {**self.parameters, **self.buffers}
        named |= {f"slot.momentum_buffer.{name}": value for name, value in self.slots.items()}
        return {name: value.detach().numpy().copy() for name, value in named.items()}

    def set_state(self, state: Any) -> None:
        """As `Session.set_state`; it refuses another set of names."""
        named: dict[str, Tensor] = {**self.parameters, **self.buffers}
        named |= {f"slot.momentum_buffer.{name}": value for name, value in self.slots.items()}
        assert set(state) == set(named)
        with torch.no_grad():
            for name, tensor in named.items():
                assert state[name].dtype == tensor.numpy(force=True).dtype
                tensor.copy_(torch.tensor(state[name]))

    def _loss_and_gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.variant == "split":
            # Exact only without BatchNorm: the mean over the batch of two half means.
            half = len(x) // 2
            total = sum(
                nn.functional.cross_entropy(self.model(x[part]), y[part], reduction="sum")
                for part in (slice(0, half), slice(half, None))
            )
            loss = total / len(x)
        else:
            loss = nn.functional.cross_entropy(self.model(x), y)
        grads = torch.autograd.grad(
            loss, [self.parameters[n] for n in self.trained], allow_unused=True
        )
        return loss.detach(), {
            n: g for n, g in zip(self.trained, grads, strict=True) if g is not None
        }

    def step(self, x: Any, y: Any) -> Result:
        """One step, with the fault."""
        x, y = (v if isinstance(v, Tensor) else torch.tensor(v) for v in (x, y))
        if self.variant == "reversed":
            x, y = x.flip(0), y.flip(0)
        if self.variant == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        if self.fault == "float32 arithmetic":
            return self._rounded(x, y)
        return self._step(x, y)

    def _rounded(self, x: Tensor, y: Tensor) -> Result:
        result = self._step(x, y)
        with torch.no_grad():
            for p in self.parameters.values():
                p.copy_(p.float())
        return result

    @torch.enable_grad()
    def _step(self, x: Tensor, y: Tensor) -> Result:
        fault = self.fault
        self.count += 1
        start = {n: b.clone() for n, b in self.buffers.items()}
        loss, g = self._loss_and_gradients(x, y)
        ascent = {n: b.clone() for n, b in self.buffers.items()}
        norm = sum((v.square().sum() for v in g.values()), torch.zeros((), dtype=x.dtype)).sqrt()
        scale = self.rho / ((norm * norm if fault == "squared norm" else norm) + 1e-12)
        scale = scale * {"no perturbation": 0.0, "wrong sign": -1.0, "rho doubled": 2.0}.get(
            fault or "", 1.0
        )
        old = {n: self.parameters[n].detach().clone() for n in g}
        with torch.no_grad():
            for n, v in g.items():
                own = self.rho / (v.norm() + 1e-12)
                self.parameters[n].add_(v * (own if fault == "per-tensor norm" else scale))
        perturbed_loss, g_adv = self._loss_and_gradients(x, y)
        adversarial = sum(
            (v.square().sum() for v in g_adv.values()), torch.zeros((), dtype=x.dtype)
        ).sqrt()
        finite = bool(torch.isfinite(torch.stack([loss, perturbed_loss, norm, adversarial])).all())
        with torch.no_grad():
            if fault != "w not restored" or not finite:
                for n, value in old.items():
                    self.parameters[n].copy_(value)
            if not finite:
                for n, b in self.buffers.items():
                    b.copy_(start[n])
            else:
                if fault != "running statistics twice":
                    for n, b in self.buffers.items():
                        b.copy_(ascent[n])
                self._update(g if fault == "first gradient reused" else g_adv, len(x))
        shown = perturbed_loss if fault == "other loss reported" else loss
        return Result(
            float(shown), float(perturbed_loss), float(norm), float(scale.abs() * norm), finite
        )

    def _update(self, gradients: dict[str, Tensor], examples: int) -> None:
        fault = self.fault
        last = list(gradients)[-1]
        for n, d in gradients.items():
            p, slot = self.parameters[n], self.slots[n]
            if fault == "gradient times batch size":
                d = d * examples
            if fault != "decay dropped":
                d = d + self.weight_decay * p
            kept = 0.0 if fault == "momentum dropped" else self.momentum
            if fault == "momentum reset in the second step" and self.count == 2:
                kept = 0.0
            d = slot * kept + d
            if fault != "stale slot":
                slot.copy_(d)
            if not (fault == "one parameter not updated" and n == last):
                p.sub_(self.lr * d)
            if fault == "nan" and n == last:
                p.view(-1)[0] = np.nan
        if fault == "swapped slots":
            a, b = twins(self.slots)
            held = self.slots[a].clone()
            self.slots[a].copy_(self.slots[b])
            self.slots[b].copy_(held)
        if fault == "frozen parameter moves":
            frozen = next(p for p in self.parameters.values() if not p.requires_grad)
            frozen.mul_(1 + 2 * torch.finfo(frozen.dtype).eps)


def twins(tensors: dict[str, Tensor]) -> tuple[str, str]:
    """Names of two tensors of one shape."""
    for name, value in tensors.items():
        for other, candidate in tensors.items():
            if name < other and value.shape == candidate.shape:
                return name, other
    raise LookupError("no two tensors of one shape")
