"""The eager SAM optimizer: a thin wrapper around a stock base optimizer."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sam_export.errors import StepConfigError
from sam_export.step.kind import Kind
from sam_export.step.norms import EPSILON, global_norm
from sam_export.step.perturbation import Perturbation, perturbed_by
from sam_export.step.variants.variant import Variant

_OWN = ("base_optimizer", "radius_key", "perturbation", "variant", "every", "ascent_steps",
        "memory", "count", "_w", "_g", "_ascended")  # fmt: skip
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
        variant: `GSAM`, `FriendlySAM`, `LookSAM`; None: SAM itself.
        every: Perturb in every ``every``-th step, from the first on (periodic SAM); the others are
            steps of the base optimizer, of one pass.
        ascent_steps: Steps of length ``rho / ascent_steps`` that lead to ``w + eps_w``, each along
            the gradient where the last one ended.
        **kwargs: Arguments of the base optimizer (``lr``, ``momentum``, ``weight_decay``, ...).

    Attributes:
        base_optimizer: The instance of the base optimizer.
        radius_key: Under which key the parameter groups hold the radius.
        count: Steps so far; it says which ones are perturbed.
        memory: What the variant keeps: parameter -> key -> tensor.

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
        variant: Variant | None = None,
        every: int = 1,
        ascent_steps: int = 1,
        **kwargs: Any,
    ) -> None:
        _check_base(base_optimizer)
        if perturbation is not None and not callable(perturbation):
            raise StepConfigError(
                f"perturbation={perturbation!r}: expected ASAM(), or a function of (parameters, "
                "gradients, radii) that returns eps by name."
            )
        self.perturbation = perturbation
        self.variant, self.every, self.ascent_steps = variant or Variant(), every, ascent_steps
        _check_variant(self.variant, every, ascent_steps)
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
        self.count = 0
        self.memory: dict[Tensor, dict[str, Tensor]] = {}
        self._w: dict[Tensor, Tensor] = {}
        self._g: dict[Tensor, Tensor] = {}
        self._ascended = 0

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

    @property
    def is_perturbed(self) -> bool:
        """Whether the step that comes is one of SAM, with two passes; `base_step` is for others."""
        return self.count % self.every == 0

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Moves ``w`` to ``w + eps_w`` along the gradient that is there now; keeps ``w``.

        With several ascent steps it is called once for each.

        Raises:
            StepConfigError: No parameter has a gradient, or it was called too often.
        """
        if self._ascended == self.ascent_steps:
            raise StepConfigError(
                f"SAM.first_step was called {('twice', 'too often')[self.ascent_steps > 1]} "
                "without second_step: the weights already stand at w + eps_w. Call second_step "
                "first."
            )
        gradients = {p: p.grad for p in self._held() if p.grad is not None}
        if not gradients:
            raise StepConfigError(
                "SAM.first_step found no gradient on any parameter. Call loss.backward() first."
            )
        if self._ascended == 0:
            self._w = {p: p.detach().clone() for p in gradients}
            gradients = self._ascend(gradients)
        for p, eps in self._eps(gradients).items():
            p.add_(eps)
        self._ascended += 1
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Puts exactly the old ``w`` back and lets the base optimizer step with the gradient.

        Raises:
            StepConfigError: `first_step` was not called before, or not for each ascent step.
        """
        if self._ascended < self.ascent_steps:
            raise StepConfigError(
                "SAM.second_step needs a first_step before it"
                f"{f', {self.ascent_steps} of them' if self.ascent_steps > 1 else ''}."
            )
        for p, w in self._w.items():
            p.copy_(w)
        if self._g:
            named = self._named(self._g)
            perturbed = {name: p.grad for name, p in named.items() if p.grad is not None}
            gradients = {name: self._g[p] for name, p in named.items()}
            self._take(named, *self.variant.descended(gradients, perturbed, self._recall(named)))
        self._w, self._g, self._ascended = {}, {}, 0
        self._update(zero_grad)

    @torch.no_grad()
    def base_step(self, zero_grad: bool = False) -> None:
        """The step between those of periodic SAM: one gradient, no perturbation.

        Raises:
            StepConfigError: `first_step` was called before: the weights stand at ``w + eps_w``.
        """
        if self._ascended:
            raise StepConfigError(
                "SAM.base_step after a first_step: the weights stand at w + eps_w. Call "
                "second_step first."
            )
        if self.variant.keys:
            named = self._named([p for p in self._held() if p.grad is not None])
            gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
            memory = self._recall(named)
            self._take(named, self.variant.between(gradients, memory), memory)
        self._update(zero_grad)

    def _update(self, zero_grad: bool) -> None:
        self.base_optimizer.step()
        self.count += 1
        # A scheduler that was attached to this object watches for its step().
        self._opt_called = True
        if zero_grad:
            self.zero_grad()

    @property
    def kind(self) -> Kind:
        """Variant, perturbation (whose result is checked) and number of ascent steps."""
        perturb = None
        if self.perturbation is not None:
            perturb = functools.partial(perturbed_by, self.perturbation)
        return Kind(self.variant, perturb, self.ascent_steps)

    def _held(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @staticmethod
    def _named(parameters: Iterable[Tensor]) -> dict[str, Tensor]:
        return {str(index): p for index, p in enumerate(parameters)}

    def _ascend(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """What is ascended, by the variant; SAM itself leaves the gradients alone."""
        if type(self.variant) is Variant:
            return gradients
        self._g = {p: g.clone() for p, g in gradients.items()}
        named = self._named(gradients)
        started = torch.tensor(int(bool(self.memory)), device=next(iter(gradients)).device)
        directions, memory = self.variant.ascended(
            {name: gradients[p] for name, p in named.items()}, self._recall(named), started
        )
        self._remember(named, memory)
        return {p: directions[name] for name, p in named.items()}

    def _eps(self, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """``eps`` of one ascent step."""
        groups = [(p, g) for g in self.param_groups for p in g["params"] if p in gradients]
        radius = {p: group[self.radius_key] / self.ascent_steps for p, group in groups}
        perturb = self.kind.perturb
        if perturb is None:
            length = global_norm([gradients[p] for p in radius]) + EPSILON
            return {p: gradients[p] * (rho / length).to(p) for p, rho in radius.items()}
        named = self._named(radius)
        eps = perturb(
            {name: p.detach() for name, p in named.items()},
            {name: gradients[p] for name, p in named.items()},
            {name: radius[p] for name, p in named.items()},
        )
        return {named[name]: value for name, value in eps.items()}

    def _recall(self, named: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        return {
            name: self.memory.get(p) or {key: torch.zeros_like(p) for key in self.variant.keys}
            for name, p in named.items()
        }

    def _remember(
        self, named: Mapping[str, Tensor], memory: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        if self.variant.keys:
            self.memory |= {named[name]: dict(own) for name, own in memory.items()}

    def _take(
        self,
        named: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        memory: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        """Keeps what a variant returned: gradients for the base optimizer, and its memory."""
        for name, gradient in gradients.items():
            named[name].grad = gradient
        self._remember(named, memory)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """All passes of a step; returns the loss of the first one, at ``w``.

        Args:
            closure: Computes the loss, calls ``backward()`` and returns the loss. It is called
                for each pass (two, in SAM itself); gradients are cleared before each call.

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
            if not self.is_perturbed:
                self.base_step()
                return loss
            for _ in range(self.ascent_steps):
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
        """The base optimizer's state and groups, ``rho`` included; and, under ``"sam"``, the number
        of steps and the memory of periodic SAM and of variants.
        """
        state: dict[str, Any] = self.base_optimizer.state_dict()
        if self.every > 1 or self.variant.keys:
            places = {p: index for index, p in enumerate(self._held())}
            memory = {places[p]: dict(own) for p, own in self.memory.items()}
            state["sam"] = {"count": self.count, "memory": memory}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores slots and groups in both optimizers; the inverse of `state_dict`."""
        self.base_optimizer.load_state_dict(state_dict)
        self._share(self.base_optimizer)
        own = state_dict.get("sam", {"count": 0, "memory": {}})
        held = self._held()
        self.count = own["count"]
        self.memory = {
            held[index]: {
                key: value.detach().clone().to(held[index]) for key, value in kept.items()
            }
            for index, kept in own["memory"].items()
        }

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


def _check_variant(variant: Any, every: Any, ascent_steps: Any) -> None:
    if not isinstance(variant, Variant):
        raise StepConfigError(
            f"variant={variant!r}: expected GSAM(), FriendlySAM(), LookSAM(), or None."
        )
    for name, value in (("every", every), ("ascent_steps", ascent_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise StepConfigError(f"{name}={value!r}: expected a whole number, at least 1.")
    own = type(variant)
    if own.between is not Variant.between and every == 1:
        raise StepConfigError(
            f"{own.__name__} says what to do in the steps between those of SAM; with every=1 there "
            "are none. Give SAM(..., every=5)."
        )
    if own.ascended is not Variant.ascended and ascent_steps > 1:
        raise StepConfigError(
            f"{own.__name__} has a direction for one ascent; give it ascent_steps=1."
        )


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
