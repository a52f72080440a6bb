"""The eager SAM optimizer: a thin wrapper around a stock base optimizer."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sam_export.errors import StepConfigError
from sam_export.step.passes import EPSILON, Perturb, global_norm
from sam_export.step.perturbation import Perturbation, perturbed_by

_OWN = ("base_optimizer", "radius_key", "perturbation", "_w")
"""Attributes that a copy has too."""


class SAM(torch.optim.Optimizer):
    """Sharpness-Aware Minimization over any `torch.optim` base optimizer.

    One step, over all parameters that have a gradient, in all groups::

        g      = gradient of the loss at w
        eps_w  = rho * g / (||g||_2 + 1e-12)      # one global norm; rho of the parameter's group
        g_adv  = gradient of the loss at w + eps_w
        w      = base_optimizer(w, g_adv)          # from exactly the old w

    The parameter groups (and the state) are shared with ``base_optimizer``, so a
    `torch.optim.lr_scheduler` works on either of the two. Parameters may live on several devices.

    The radius is ``group["rho"]``. A base optimizer with a ``rho`` of its own (Adadelta's decay)
    keeps the name in the groups: its own is given as ``base_rho``, and the radius is
    ``group["sam_rho"]``. `radius_key` says which.

    Example::

        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        loss_fn(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        loss_fn(model(x), y).backward()
        optimizer.second_step(zero_grad=True)

    Args:
        params: Parameters, or groups of them with their own ``rho``, ``lr``, ``weight_decay``, ...
        base_optimizer: Class of the base optimizer (``torch.optim.SGD``), not an instance.
        rho: Radius of the perturbation, at least 0, in units of the weights.
        perturbation: Another ``eps_w``: `ASAM`, or your own pure function, see
            `step.perturbation.Perturbation`. None: the one above.
        **kwargs: Arguments of the base optimizer (``lr``, ``momentum``, ``weight_decay``, ...).

    Attributes:
        base_optimizer: The instance of the base optimizer.
        radius_key: Under which key the parameter groups hold the radius.

    Raises:
        StepConfigError: ``rho`` is negative or not a number, or the base optimizer cannot be used.
            It is a `ValueError`.

    Source: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently
        Improving Generalization", 2021, https://arxiv.org/abs/2010.01412, eq. 2 and algorithm 1.
    """

    base_optimizer: torch.optim.Optimizer

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[torch.optim.Optimizer],
        rho: float = 0.05,
        perturbation: Perturbation | None = None,
        **kwargs: Any,
    ) -> None:
        _check_base(base_optimizer)
        if perturbation is not None and not callable(perturbation):
            raise StepConfigError(
                f"perturbation={perturbation!r}: expected ASAM(), or a function of (parameters, "
                "gradients, radii) that returns eps by name."
            )
        self.perturbation = perturbation
        names = inspect.signature(base_optimizer).parameters
        self.radius_key = "sam_rho" if "rho" in names else "rho"
        kwargs = self._renamed(kwargs)
        groups = [self._renamed(item) if isinstance(item, dict) else item for item in params]
        super().__init__(groups, {**kwargs, self.radius_key: _checked_rho(rho)})
        for group in self.param_groups:
            _checked_rho(group[self.radius_key])
        # The base optimizer keeps the very same group dictionaries and fills in its own defaults.
        self._share(base_optimizer(self.param_groups, **kwargs))
        self.defaults = {**self.base_optimizer.defaults, self.radius_key: rho}
        self._w: dict[Tensor, Tensor] = {}

    def _renamed(self, options: dict[str, Any]) -> dict[str, Any]:
        """``rho`` and ``base_rho`` of a parameter group under the names that the groups hold."""
        if self.radius_key == "rho":
            return options
        names = {"rho": self.radius_key, "base_rho": "rho"}
        return {names.get(key, key): value for key, value in options.items()}

    def _share(self, base_optimizer: torch.optim.Optimizer) -> None:
        self.base_optimizer = base_optimizer
        self.param_groups = base_optimizer.param_groups
        self.state = base_optimizer.state

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Moves ``w`` to ``w + eps_w`` along the gradient that is there now; keeps ``w``.

        Raises:
            StepConfigError: No parameter has a gradient, or `first_step` was called twice.
        """
        if self._w:
            raise StepConfigError(
                "SAM.first_step was called twice without second_step: the weights already stand "
                "at w + eps_w. Call second_step first."
            )
        grads = [
            p.grad for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        if not grads:
            raise StepConfigError(
                "SAM.first_step found no gradient on any parameter. Call loss.backward() first."
            )
        norm = global_norm(grads)
        every = self._other_eps() if self.perturbation is not None else None
        for group in self.param_groups:
            scale = group[self.radius_key] / (norm + EPSILON)
            for p in group["params"]:
                if p.grad is None:
                    continue
                eps = p.grad * scale.to(p) if every is None else every[p]
                self._w[p] = p.detach().clone()
                p.add_(eps)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Puts exactly the old ``w`` back and lets the base optimizer step with the gradient.

        Raises:
            StepConfigError: `first_step` was not called before.
        """
        if not self._w:
            raise StepConfigError("SAM.second_step needs a first_step before it.")
        for p, w in self._w.items():
            p.copy_(w)
        self._w = {}
        self.base_optimizer.step()
        # A scheduler that was attached to this object watches for its step().
        self._opt_called = True
        if zero_grad:
            self.zero_grad()

    @property
    def perturb(self) -> Perturb | None:
        """`perturbation`, with its result checked."""
        if self.perturbation is None:
            return None
        return functools.partial(perturbed_by, self.perturbation)

    def _other_eps(self) -> dict[Tensor, Tensor]:
        assert self.perturb is not None
        held = [(p, g) for g in self.param_groups for p in g["params"] if p.grad is not None]
        named = {str(index): p for index, (p, _) in enumerate(held)}
        eps = self.perturb(
            {name: p.detach() for name, p in named.items()},
            {name: p.grad for name, p in named.items() if p.grad is not None},
            {str(index): group[self.radius_key] for index, (_, group) in enumerate(held)},
        )
        return {named[name]: value for name, value in eps.items()}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Both passes; returns the loss of the first one, at ``w``.

        Args:
            closure: Computes the loss, calls ``backward()`` and returns the loss. It is called
                twice; gradients are cleared before each call.

        Raises:
            StepConfigError: No closure was given: one step of SAM needs two gradients.
        """
        if closure is None:
            raise StepConfigError(
                "SAM.step needs a closure that computes the loss, calls backward() and returns "
                "the loss, since one step takes two gradients. Or call first_step and second_step."
            )
        with torch.enable_grad():
            self.zero_grad()
            loss = closure()
            self.first_step(zero_grad=True)
            closure()
            self.second_step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to both optimizers; without its own ``rho`` it takes the default one."""
        if not hasattr(self, "base_optimizer"):  # while Optimizer.__init__ collects the groups
            super().add_param_group(param_group)
            return
        param_group = self._renamed(param_group)
        param_group.setdefault(self.radius_key, self.defaults[self.radius_key])
        _checked_rho(param_group[self.radius_key])
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and groups, ``rho`` included."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores slots and groups in both optimizers; the inverse of `state_dict`."""
        self.base_optimizer.load_state_dict(state_dict)
        self._share(self.base_optimizer)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in _OWN}
        return {**super().__getstate__(), **own}

    def __repr__(self) -> str:
        groups = "; ".join(
            f"{len(group['params'])} tensors, rho {group[self.radius_key]:g}, "
            f"lr {float(group['lr']):g}"
            for group in self.param_groups
        )
        return f"SAM({type(self.base_optimizer).__name__}: {groups})"


def _checked_rho(rho: Any) -> float:
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not math.isfinite(rho):
        raise StepConfigError(f"rho={rho!r}: expected a finite number, at least 0.")
    if rho < 0:
        raise StepConfigError(f"rho={rho!r}: the radius of the perturbation cannot be negative.")
    return float(rho)


def _check_base(base_optimizer: Any) -> None:
    if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, torch.optim.Optimizer)):
        raise StepConfigError(
            f"base_optimizer={base_optimizer!r}: expected the class of a torch optimizer, such as "
            "torch.optim.SGD (not an instance)."
        )
    if issubclass(base_optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam, SAM)):
        raise StepConfigError(
            f"{base_optimizer.__name__} cannot be the base optimizer of SAM: it needs its own "
            "closure, or sparse gradients."
        )
