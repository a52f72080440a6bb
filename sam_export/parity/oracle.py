"""The oracle: plain eager SAM over a stock `torch.optim` optimizer.

It imports nothing of this package but its own random numbers, which import nothing of it, on
purpose: an agreement is then between two independent pieces of code. It is the two-pass loop as a
careful person writes it by hand, for clarity, not for speed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sam_export.parity.oracle_average import OracleAverage
from sam_export.parity.oracle_batch import Batch, loss_of
from sam_export.parity.oracle_parts import Rounds, parts_of
from sam_export.parity.oracle_precision import OraclePrecision, wide_norm
from sam_export.parity.oracle_random import OracleDraws
from sam_export.parity.oracle_slots import OracleSlots
from sam_export.parity.oracle_state import OracleState
from sam_export.parity.oracle_surroundings import (
    default_dtype,
    generator_states,
    set_generator_states,
)
from sam_export.parity.oracle_variants import OracleVariant, clip, other_perturbation


class Oracle(OracleState):
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
        variant: GSAM, Friendly SAM or LookSAM; None: SAM itself.
        every: Only a step whose number is divisible by it is one of SAM.
        average: Of the weights, over the steps; None: there is none.
        ascent_steps: How many steps lead to ``w + eps``, each of length ``rho / ascent_steps``.
        micro_batches: Into how many equal parts a batch is cut; gradients are means over them.
        perturbation_per: ``"batch"``, or ``"micro_batch"``: all up to the second gradient is done
            for each part alone, and the update gets the mean.

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
        variant: OracleVariant | None = None,
        every: int = 1,
        ascent_steps: int = 1,
        average: OracleAverage | None = None,
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
        self.variant = variant or OracleVariant()
        self.average = average or OracleAverage()
        self.every, self.ascent_steps = every, ascent_steps
        self.micro_batches, self.perturbation_per = micro_batches, perturbation_per
        self._drawn = self._first_draw = 0
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
        self.variant.double()
        self.average.double()
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
        with torch.enable_grad(), default_dtype(self.is_double):
            result = self._step(self.tensors(batch), overflows)
        self.step_count += int(bool(result["finite"]) or self.on_nonfinite != "raise")
        return result

    def _step(self, batch: Batch, overflows: bool) -> dict[str, float | bool]:
        parameters, buffers = list(self.model.parameters()), list(self.model.buffers())
        buffers_at_start = [buffer.clone() for buffer in buffers]
        kept_at_start = self.variant.copy_of_kept()
        self._drawn = 0
        parts = parts_of(batch, self.micro_batches)
        # Parts that share one perturbation make a round.
        per_part = self.perturbation_per == "micro_batch"
        rounds = Rounds(len(parts) if per_part else 1)
        for members in [[part] for part in parts] if per_part else [parts]:
            self._round(members, rounds)
        self.draws = self._drawn
        with torch.no_grad():
            means = rounds.means()
            scalars = [means["loss"], means["perturbed_loss"], *rounds.scalars["grad_norm"]]
            if rounds.count > 1:
                rounds.put_gradients("g", parameters)
                means["grad_norm"] = self._grad_norm()
                scalars += [means["grad_norm"], means["perturbation_norm"]]
                rounds.put_gradients("g_adv", parameters)
            perturbed_grad_norm = self._grad_norm()
            scalars.append(perturbed_grad_norm)
            finite = all(bool(torch.isfinite(value)) for value in scalars) and not overflows
            self.stages = rounds.stages if finite else {}
            if not finite and self.on_nonfinite != "ignore":
                self._put_back(buffers, buffers_at_start)
                self.variant.kept = kept_at_start
            else:
                clip(self.optimizer.param_groups, self.clip_norm, self.clip_value)
                self.optimizer.step()
                self.average.take(self.model)
        self.zero_grad()
        scaled = self.precision.results()
        self.precision.update(finite)
        clipping = {"perturbed_grad_norm": float(perturbed_grad_norm)} if self.clips else {}
        return {
            **clipping,
            **scaled,
            **{name: float(value) for name, value in means.items()},
            "finite": finite,
        }

    def _round(self, members: Sequence[Batch], rounds: Rounds) -> None:
        """Both passes of parts that share one perturbation; ends at ``w``, with ``g_adv``."""
        parameters, buffers = list(self.model.parameters()), list(self.model.buffers())
        generators = generator_states()
        self._first_draw = self._drawn
        stages: dict[str, Tensor] = {}

        # First pass, at w.
        loss = self._pass(members)
        buffers_after_ascent = [buffer.clone() for buffer in buffers]
        is_perturbed = self.step_count % self.every == 0
        with torch.no_grad():
            if is_perturbed:
                self._add_decay()
            grad_norm = self._grad_norm()
            rounds.add_gradients("g", parameters)
            w = {p: p.clone() for p in self._with_gradient()}
            g = {name: p.grad.clone() for name, p in self._named(w) if p.grad is not None}
        perturbed_loss = loss
        steps: list[list[Tensor]] = []
        if is_perturbed:
            self.variant.ascend(self._named(w))
            for number in range(self.ascent_steps):
                if number > 0:
                    self._pass(members, generators)
                    self._add_decay()
                steps.append(self._climb(stages if number == 0 else {}))
            # Last pass, at w + eps.
            perturbed_loss = self._pass(members, generators)
        with torch.no_grad():
            eps = {name: p - w[p] for name, p in self._named(w)}
            # Of what was added, which is more exact than what came of it.
            added = [torch.stack(each).sum(0) for each in zip(*steps, strict=True)]
            perturbation_norm = wide_norm(added or list(eps.values()))
            for p, value in w.items():
                p.copy_(value)
            self.without_gradient = self._without_gradient()
            if self.keeps_stages and is_perturbed:
                stages |= {f"eps.{name}": value for name, value in eps.items()}
                stages |= {f"g_adv.{n}": p.grad for n, p in self._named(w) if p.grad is not None}
                rounds.add_stages(stages)
            if is_perturbed:
                self.variant.descend(self._named(w), g)
            else:
                self.variant.between(self._named(w))
            if self.running_stats == "ascent":
                self._put_back(buffers, buffers_after_ascent)
            rounds.add_gradients("g_adv", parameters)
        rounds.note(
            loss=loss, perturbed_loss=perturbed_loss,
            grad_norm=grad_norm, perturbation_norm=perturbation_norm,
        )  # fmt: skip

    def _pass(self, members: Sequence[Batch], again: Any = None) -> Tensor:
        """Mean loss, and its gradient, where the weights stand.

        Args:
            members: The parts of the batch.
            again: In a later pass, where torch's generators stood before the first one.
        """
        self.zero_grad()
        is_same = again is not None and self.randomness == "same"
        if is_same:
            set_generator_states(again)
        total = torch.zeros(())
        with self._drawing(self._first_draw if is_same else self._drawn) as draws:
            for member in members:
                loss = self._loss(member) / len(members)
                self.precision.backward(loss)
                total = total.to(loss) + loss.detach()
        self.precision.unscale(self.model.parameters())
        self._drawn = max(self._drawn, draws.next)
        return total

    def gradient(self, batch: Batch) -> Tensor:
        """Loss where the weights stand; puts its gradient into them, and changes the buffers.

        Args:
            batch: As `tensors` makes it.
        """
        self._drawn = 0
        with torch.enable_grad(), default_dtype(self.is_double):
            return self._pass(parts_of(batch, self.micro_batches))

    @torch.no_grad()
    def _add_decay(self) -> None:
        """The weight decay's part of the gradients, if it is ascended, too."""
        for group in self.optimizer.param_groups if self.decay_in_ascent else ():
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(p, alpha=group.get("weight_decay", 0.0))

    @torch.no_grad()
    def _climb(self, stages: dict[str, Tensor]) -> list[Tensor]:
        """Moves the weights by ``eps`` of the gradients that are there, or by one step of it.

        Returns:
            What was added.
        """
        groups = self.optimizer.param_groups
        held = [(p, g[self.radius]) for g in groups for p in g["params"] if p.grad is not None]
        names = {p: name for name, p in self.model.named_parameters()}
        others = other_perturbation(
            self.model, groups, self.radius, self.perturbation, self.adaptive, self.ascent_steps
        )
        radii = [radius for _, radius in held]
        steps = []
        norm = self._grad_norm(radii if self.norm_over == "perturbed" else None)
        for p, radius in held:
            assert p.grad is not None
            if self.norm_over == "tensor":
                norm = p.grad.norm()
            e = radius / self.ascent_steps * p.grad / (norm.to(p.device) + 1e-12)
            e = (e if others is None else others[names[p]]).to(p.dtype)
            p.add_(e)
            steps.append(e)
            if self.keeps_stages:
                stages[f"g.{names[p]}"] = p.grad.clone()
        return steps

    def _with_gradient(self) -> list[Tensor]:
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.grad is not None]

    def _named(self, parameters: Collection[Tensor]) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.model.named_parameters() if p in parameters]

    def _loss(self, batch: Batch) -> Tensor:
        with self.precision.casting(self.device):
            return loss_of(self.model, self.loss_fn, self.num_targets, batch)

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

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)  # parameters that the optimizer does not hold

    @staticmethod
    def _put_back(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)

    @contextmanager
    def _drawing(self, first: int) -> Iterator[OracleDraws]:
        draws = OracleDraws(self.seed, self.step_count, first)
        if self.generator == "torch":
            yield draws
        else:
            with draws:
                yield draws
