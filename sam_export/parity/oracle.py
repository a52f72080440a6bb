"""The oracle: plain eager SAM over a stock `torch.optim` optimizer.

It imports nothing of this package but its own random numbers, which import nothing of it, on
purpose: an agreement is then between two independent pieces of code. It is the two-pass loop as a
careful person writes it by hand, for clarity, not for speed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sam_export.parity.oracle_parts import Rounds, parts_of
from sam_export.parity.oracle_precision import OraclePrecision, wide_norm
from sam_export.parity.oracle_random import OracleDraws, generator_states, set_generators
from sam_export.parity.oracle_slots import OracleSlots, host_copy
from sam_export.parity.oracle_variants import clip, other_perturbation

Batch = Sequence[Any] | Mapping[str, Any]


class Oracle:
    """Eager SAM on its own copy of a model and a base optimizer.

    One step, with ``i`` over the parameters that have a gradient and ``k(i)`` their group::

        loss.backward()                         # at w
        g_i   += weight_decay_k(i) * w_i        # only with decay_in_ascent
        norm   = sqrt(sum_i ||g_i||^2)
        w_i   += rho_k(i) * g_i / (norm + 1e-12)
        perturbed_loss.backward()               # at w + eps
        w_i    = what it was
        base_optimizer.step()

    Args:
        model: The model; it is copied, together with the loss and the optimizer.
        loss_fn: ``loss_fn(output, *targets)``. None: the model returns the loss.
        base_optimizer: A stock optimizer whose parameter groups have a ``"rho"``, or, where it has
            one of its own (Adadelta), a ``"sam_rho"``.
        num_targets: How many entries at the end of a tuple batch go to the loss.
        running_stats: ``"ascent"``: buffers keep what the first pass made of them; ``"both"``.
        randomness: ``"same"``: the second pass draws what the first one drew; ``"fresh"``.
        generator: ``"philox"``: random numbers come from (seed, step, draw), see `oracle_random`;
            ``"torch"``: from torch's generators.
        seed: For ``"philox"``: 64 bits.
        step_count: For ``"philox"``: number of the next step.
        on_nonfinite: ``"ignore"`` updates regardless; otherwise a step whose losses or gradient
            norms are not finite changes nothing.
        decay_in_ascent: Whether ``weight_decay * w`` is part of the gradient that is ascended.
        norm_over: ``"all"`` gradients; ``"perturbed"``: those of groups with a radius;
            ``"tensor"``: each parameter its own (no step of ours, but loops of users).
        perturbation: The user's own ``eps``, a function of (parameters, gradients, radii), by name.
        adaptive: For adaptive SAM: its ``eta``.
        clip_norm: Of ``g_adv``, by `torch.nn.utils.clip_grad_norm_`, after ``clip_value``.
        clip_value: Of ``g_adv``, by `torch.nn.utils.clip_grad_value_`.
        precision: Autocast and loss scaling; None: neither.
        micro_batches: Into how many equal parts a batch is cut; gradients are means over them.
        perturbation_per: ``"batch"``, or ``"micro_batch"``: the steps up to the second gradient are
            taken for each part alone, and the update gets the mean.

    Source: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently
        Improving Generalization", 2021, https://arxiv.org/abs/2010.01412, algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor] | None,
        base_optimizer: torch.optim.Optimizer,
        *,
        num_targets: int = 1,
        running_stats: str = "ascent",
        randomness: str = "same",
        generator: str = "torch",
        seed: int = 0,
        step_count: int = 0,
        on_nonfinite: str = "skip",
        decay_in_ascent: bool = False,
        norm_over: str = "all",
        perturbation: Callable[..., Mapping[str, Tensor]] | None = None,
        adaptive: float | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        precision: OraclePrecision | None = None,
        micro_batches: int = 1,
        perturbation_per: str = "batch",
    ) -> None:
        # One deepcopy, so that the copied optimizer holds the copied model's parameters.
        memo: dict[int, Any] = {}
        self.model, self.loss_fn, self.optimizer = copy.deepcopy(
            (model, loss_fn, base_optimizer), memo
        )
        # Copying a torch optimizer leaves out what a class of somebody else's keeps beside its
        # groups and its state.
        for name, value in vars(base_optimizer).items():
            if name not in vars(self.optimizer):
                setattr(self.optimizer, name, copy.deepcopy(value, memo))
        self._slots = OracleSlots()
        self.radius = "sam_rho" if "rho" in base_optimizer.defaults else "rho"
        self.num_targets = num_targets
        self.running_stats = running_stats
        self.randomness = randomness
        self.generator = generator
        self.seed, self.step_count = seed, step_count
        self.draws = 0
        """How many draws the last step took from its own generator."""
        self.is_counting = False
        """Whether seed and step number are part of the state."""
        self.on_nonfinite = on_nonfinite
        self.decay_in_ascent = decay_in_ascent
        self.norm_over, self.perturbation, self.adaptive = norm_over, perturbation, adaptive
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.precision = precision or OraclePrecision()
        self.micro_batches, self.perturbation_per = micro_batches, perturbation_per
        self.keeps_stages = False
        """Whether a snapshot holds the gradients and perturbations of the last step."""
        self.stages: dict[str, Tensor] = {}
        self.is_double = False
        self.without_gradient: set[str] = set()
        """Parameters to which the last step gave no gradient: frozen, unused, or not optimized."""

    def double(self) -> Oracle:
        """Turns model, loss, slots and every later batch into float64; returns itself."""
        self.model.double()
        if isinstance(self.loss_fn, nn.Module):
            self.loss_fn.double()
        for entries in self.optimizer.state.values():
            for key, value in entries.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    entries[key] = value.double()
        self.is_double = self.precision.is_exact = True
        return self

    # -- one step -----------------------------------------------------------------------------

    def step(self, batch: Batch, overflows: bool = False) -> dict[str, float | bool]:
        """Runs one SAM step.

        Args:
            batch: A tuple (inputs, then targets) or a dict (inputs are named after ``forward``'s
                parameters, the other entries are targets) of tensors or NumPy arrays.
            overflows: The step is not finite, whatever is found: float64 has room for what
                overflows in float16.

        Returns:
            ``loss``, ``perturbed_loss``, ``grad_norm``, ``perturbation_norm`` and ``finite``.
        """
        with torch.enable_grad(), self._default_dtype():
            result = self._step(self.tensors(batch), overflows)
        self.step_count += int(bool(result["finite"]) or self.on_nonfinite != "raise")
        return result

    def base_step(self, batch: Batch) -> None:
        """One step of the base optimizer alone: one pass, no perturbation."""
        with torch.enable_grad(), self._default_dtype():
            self._zero_grad()
            self._plain_pass(batch)
            self.optimizer.step()
            self._zero_grad()

    def loss_and_gradient(self, batch: Batch) -> tuple[float, dict[str, NDArray[Any]]]:
        """Loss and gradient at the current weights, by name; buffers are put back."""
        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        with torch.enable_grad(), self._default_dtype():
            self._zero_grad()
            loss = self._plain_pass(batch)
        with torch.no_grad():
            self._put_back(buffers, before)
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        gradient = {
            name: host_copy(p.grad)
            for name, p in self.model.named_parameters()
            if p.grad is not None and id(p) in held
        }
        self._zero_grad()
        return loss, gradient

    def _step(self, batch: Batch, overflows: bool) -> dict[str, float | bool]:
        groups = self.optimizer.param_groups
        parameters = list(self.model.parameters())
        buffers = list(self.model.buffers())
        buffers_at_start = [buffer.clone() for buffer in buffers]
        parts = parts_of(batch, self.micro_batches)
        # Parts that share one perturbation make a round.
        per_part = self.perturbation_per == "micro_batch"
        members_of = [[part] for part in parts] if per_part else [parts]
        rounds = Rounds(len(members_of))
        self.draws = 0
        for members in members_of:
            generators, first = generator_states(), self.draws

            # First pass, at w.
            self._zero_grad()
            loss = self._pass(members, first)
            buffers_after_ascent = [buffer.clone() for buffer in buffers]
            with torch.no_grad():
                grad_norm, perturbation_norm, old = self._perturb(rounds)
                rounds.add_gradients("g", parameters)

            # Second pass, at w + eps.
            self._zero_grad()
            if self.randomness == "same":
                set_generators(generators)
            perturbed_loss = self._pass(members, first if self.randomness == "same" else self.draws)
            with torch.no_grad():
                for p, value in old:
                    p.copy_(value)
                self.without_gradient = self._without_gradient()
                if self.keeps_stages:
                    rounds.add_stages(
                        {f"g_adv.{self._name(p)}": p.grad for p, _ in old if p.grad is not None}
                    )
                rounds.add_gradients("g_adv", parameters)
                if self.running_stats == "ascent":
                    self._put_back(buffers, buffers_after_ascent)
            rounds.note(
                loss=loss, perturbed_loss=perturbed_loss,
                grad_norm=grad_norm, perturbation_norm=perturbation_norm,
            )  # fmt: skip
        with torch.no_grad():
            norms = [grad_norm]
            if rounds.count > 1:
                rounds.put_gradients("g", parameters)
                norms = [self._grad_norm(), *rounds.scalars["grad_norm"]]
                rounds.put_gradients("g_adv", parameters)
            perturbed_grad_norm = self._grad_norm()
            scalars = (rounds.mean("loss"), rounds.mean("perturbed_loss"), *norms)
            scalars += (rounds.mean("perturbation_norm"), perturbed_grad_norm)
            finite = all(bool(torch.isfinite(value)) for value in scalars) and not overflows
            self.stages = rounds.stages if finite else {}
            if not finite and self.on_nonfinite != "ignore":
                self._put_back(buffers, buffers_at_start)
            else:
                clip(groups, self.clip_norm, self.clip_value)
                self.optimizer.step()
        self._zero_grad()
        scaled = self.precision.results()
        self.precision.update(finite)
        clipping = {"perturbed_grad_norm": float(perturbed_grad_norm)} if self.clips else {}
        return {
            **clipping,
            **scaled,
            "loss": float(rounds.mean("loss")),
            "perturbed_loss": float(rounds.mean("perturbed_loss")),
            "grad_norm": float(norms[0]),
            "perturbation_norm": float(rounds.mean("perturbation_norm")),
            "finite": finite,
        }

    def _pass(self, members: Sequence[Batch], first_draw: int) -> Tensor:
        """Mean loss of the parts; its gradient is added up in the parameters."""
        losses = []
        with self._drawing(first_draw) as draws:
            for member in members:
                loss = self._loss(member)
                losses.append(loss.detach())
                self.precision.backward(loss / len(members) if len(members) > 1 else loss)
        self.precision.unscale(self.model.parameters())
        self.draws = max(self.draws, draws.next)
        return torch.stack(losses).mean()

    def _plain_pass(self, batch: Batch) -> float:
        """A pass without the scale of the loss; the mean loss of the parts."""
        parts = parts_of(self.tensors(batch), self.micro_batches)
        total = 0.0
        with self._drawing(0):
            for part in parts:
                loss = self._loss(part) / len(parts)
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        return total

    def _perturb(self, rounds: Rounds) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Moves the weights to ``w + eps``; the norms of ``g`` and ``eps``, and what they were."""
        groups = self.optimizer.param_groups
        old: list[tuple[Tensor, Tensor]] = []
        perturbations: list[Tensor] = []
        if self.decay_in_ascent:
            for group in groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.add_(p, alpha=group.get("weight_decay", 0.0))
        grad_norm = self._grad_norm()
        others = other_perturbation(
            self.model, groups, self.radius, self.perturbation, self.adaptive
        )
        norm = grad_norm
        if self.norm_over == "perturbed":
            held = [(p, g[self.radius]) for g in groups for p in g["params"]]
            norm = self._grad_norm([radius for p, radius in held if p.grad is not None])
        for group in groups:
            for p in group["params"]:
                if p.grad is not None:
                    if self.norm_over == "tensor":
                        norm = p.grad.norm()
                    e = group[self.radius] * p.grad / (norm.to(p.device) + 1e-12)
                    e = (e if others is None else others[self._name(p)]).to(p.dtype)
                    old.append((p, p.clone()))
                    perturbations.append(e)
                    p.add_(e)
                    if self.keeps_stages:
                        name = self._name(p)
                        rounds.add_stages({f"g.{name}": p.grad, f"eps.{name}": p - old[-1][1]})
        return grad_norm, wide_norm(perturbations), old

    def _name(self, parameter: Tensor) -> str:
        return next(name for name, p in self.model.named_parameters() if p is parameter)

    def _loss(self, batch: Batch) -> Tensor:
        with self.precision.casting(self.device):
            return self._loss_as_it_is(batch)

    def _loss_as_it_is(self, batch: Batch) -> Tensor:
        if isinstance(batch, Mapping):
            parameters = inspect.signature(self.model.forward).parameters
            takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            count = len(batch) - (self.num_targets if self.loss_fn is not None else 0)
            inputs = (
                list(batch)[:count] if takes_any else [key for key in batch if key in parameters]
            )
            output = self.model(**{key: batch[key] for key in inputs})
            targets = [value for key, value in batch.items() if key not in inputs]
        else:
            count = len(batch) - (self.num_targets if self.loss_fn is not None else 0)
            output = self.model(*batch[:count])
            targets = list(batch[count:])
        loss: Tensor = output if self.loss_fn is None else self.loss_fn(output, *targets)
        return loss

    @property
    def clips(self) -> bool:
        """Whether the second gradient is clipped."""
        return self.clip_norm is not None or self.clip_value is not None

    def _grad_norm(self, radii: Sequence[float] | None = None) -> Tensor:
        """Over all gradients, or over those of them whose radius is not zero."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in held if p.grad is not None]
        if radii is not None:
            chosen = [g for g, radius in zip(gradients, radii, strict=True) if radius]
            gradients = chosen or [torch.zeros_like(gradients[0])]
        return wide_norm(gradients)

    def _without_gradient(self) -> set[str]:
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        named = self.model.named_parameters()
        return {name for name, p in named if p.grad is None or id(p) not in held}

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)  # parameters that the optimizer does not hold

    @staticmethod
    def _put_back(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)

    # -- state by name ------------------------------------------------------------------------

    @property
    def parameter_names(self) -> list[str]:
        """Names of all parameters, frozen ones included; a tied one under its first name."""
        return [name for name, _ in self.model.named_parameters()]

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """Copies of parameters and buffers by torch's names, and slots as ``slot.<key>.<name>``.

        Raises:
            TypeError: The optimizer keeps something else than tensors and numbers.
        """
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        state = {name: host_copy(value) for name, value in named.items()}
        if self.is_counting:
            state |= {"rng.seed": np.array(self.seed), "counter.step": np.array(self.step_count)}
        state |= self.precision.snapshot()
        state |= {f"stage.{name}": host_copy(value) for name, value in self.stages.items()}
        return state | self._slots.snapshot(self.model, self.optimizer)

    @torch.no_grad()
    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """The inverse of `snapshot`; a slot that is not in ``state`` is one not made yet."""
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, tensor in named.items():
            tensor.copy_(torch.tensor(state[name]))
        if self.is_counting:
            self.seed, self.step_count = int(state["rng.seed"]), int(state["counter.step"])
        self.precision.load(state)
        self._slots.load(self.model, self.optimizer, state, self.is_double)

    @contextmanager
    def _drawing(self, first: int) -> Iterator[OracleDraws]:
        draws = OracleDraws(self.seed, self.step_count, first)
        if self.generator == "torch":
            yield draws
        else:
            with draws:
                yield draws

    # -- surroundings -------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the first parameter lives; batches are moved there."""
        return next(self.model.parameters()).device

    def tensors(self, batch: Batch) -> Batch:
        """The batch on the model's device and, for the judge, in float64."""

        def moved(value: Any) -> Tensor:
            tensor = value if isinstance(value, Tensor) else torch.tensor(np.asarray(value))
            tensor = tensor.detach().to(self.device)
            return tensor.double() if self.is_double and tensor.is_floating_point() else tensor

        if isinstance(batch, Mapping):
            return {key: moved(value) for key, value in batch.items()}
        return [moved(value) for value in batch]

    @contextmanager
    def _default_dtype(self) -> Iterator[None]:
        # Constants made in forward, and slots such as NAdam's mu_product, take the default dtype.
        before = torch.get_default_dtype()
        if self.is_double:
            torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
