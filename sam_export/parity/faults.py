"""The faults of one step: right values go in, and selected ones come out.

Every fault is there at once, as a selection (`torch.where`) between the right value and the wrong
one by a number in the state; with the number 0 all selections take the right values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sam_export.errors import ParityError
from sam_export.parity.mutants import MUTANTS, NUMBERS, ModelName
from sam_export.step.gradient import Objective
from sam_export.step.norms import EPSILON, global_norm
from sam_export.step.passes import Passes
from sam_export.step.update import Slots

SELECTOR = "mutant"
"""Buffer of the model that says which fault a step has; 0: none."""

LARGE_EPSILON = 1e-3
"""What "large epsilon" adds to the norm."""


class Faults:
    """The faults of one step: right values in, selected values out."""

    def __init__(self, kind: ModelName, selector: Tensor, values: Sequence[Tensor]) -> None:
        self._present = {mutant.name for mutant in MUTANTS if kind in mutant.models}
        self._selector = selector
        self._selected: dict[str, Tensor] = {}
        # The number of examples as a tensor: not every target computes with symbolic sizes.
        self._examples = torch.ones_like(values[-1], dtype=torch.float32).sum()
        x = values[0]
        self._per_channel = (
            torch.ones_like(x[:, 0], dtype=torch.float32).sum() if x.dim() > 2 else self._examples
        )
        self.first: dict[str, Tensor] = {}
        self.second_norm: Tensor | None = None
        self.descent_buffers: Mapping[str, Tensor] = {}
        self.eps: dict[str, Tensor] = {}

    def begin(
        self,
        w: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        slots: Slots,
        rho: Tensor,
        groups: Sequence[Sequence[str]],
    ) -> None:
        """Takes what the step starts from."""
        self._w, self._buffers, self._slots = w, buffers, slots
        self._rho, self._groups = rho.unbind(), groups
        self.last = next(name for names in reversed(groups) for name in reversed(names))

    def pick(self, name: str, wrong: Tensor, right: Tensor) -> Tensor:
        """``wrong`` where the fault of that name is selected; ``right`` where it is no fault."""
        if name not in self._present:
            return right
        return torch.where(self._is(name), wrong.to(right.dtype), right)

    def _is(self, name: str) -> Tensor:
        if name not in self._selected:
            self._selected[name] = self._selector == NUMBERS[name]
        return self._selected[name]

    def chosen(
        self,
        name: str,
        wrong: tuple[Mapping[str, Tensor], Slots],
        right: tuple[dict[str, Tensor], Slots],
    ) -> tuple[dict[str, Tensor], Slots]:
        """`pick` for all parameters and slots."""
        updated = {key: self.pick(name, wrong[0][key], value) for key, value in right[0].items()}
        slots = {
            owner: {k: self.pick(name, wrong[1][owner][k], v) for k, v in entries.items()}
            for owner, entries in right[1].items()
        }
        return updated, slots

    # -- before the passes --------------------------------------------------------------------

    def in_hyper(self, hyper: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Wrong radii and learning rates."""
        rho, lr = hyper["rho"], hyper["lr"]
        if len(rho) > 1:
            right = rho
            rho = self.pick("rho of another group", torch.stack(right.unbind()[::-1]), rho)
            rho = self.pick("one rho for all groups", torch.ones_like(right) * right[0], rho)
            lr = self.pick("lr of another group", torch.stack(lr.unbind()[::-1]), lr)
        return {**hyper, "rho": rho, "lr": lr}

    def in_slots(self, slots: Slots, buffers: Mapping[str, Tensor]) -> Slots:
        """Wrong slots to start from."""
        counted = [v for name, v in buffers.items() if name.endswith("num_batches_tracked")]
        counted += [entries["step"] for entries in slots.values() if "step" in entries]
        is_second = (counted[0] == 1).to(torch.float32)

        def wrong(key: str, value: Tensor) -> Tensor:
            if key == "step":
                return self.pick("bias correction stuck", torch.zeros_like(value), value)
            reset = value * (1.0 - is_second)
            right = self.pick("momentum reset", reset, value)
            return self.pick("momentum dropped", torch.zeros_like(value), right)

        return {
            name: {key: wrong(key, value) for key, value in entries.items()}
            for name, entries in slots.items()
        }

    # -- the passes ---------------------------------------------------------------------------

    def between(self, right: Objective, turned: Objective) -> Objective:
        """The objective of both passes; the second call is that of the second pass.

        Args:
            right: The loss of the batch.
            turned: The loss of the batch that the second pass sees.
        """

        def evaluate(
            parameters: Mapping[str, Tensor],
            buffers: Mapping[str, Tensor],
            use: Callable[[Tensor, Any], Any],
        ) -> Any:
            if not self.first:
                loss, outputs, gradients = right(parameters, buffers, use)
                self.first = self._by_name(gradients)
                return loss, outputs, gradients
            with torch.no_grad():
                off = self._off()
            moved = {name: p + off[name] if name in off else p for name, p in parameters.items()}
            loss, outputs, gradients = turned(moved, buffers, use)
            self.descent_buffers = buffers
            with torch.no_grad():
                found = self._by_name(gradients)
                self.second_norm = global_norm(list(found.values()))
                wrong = self._in_gradients(found)
            return loss, outputs, tuple(wrong.get(name) for name in self._names())

        return evaluate

    def _names(self) -> list[str]:
        return [name for names in self._groups for name in names]

    def _by_name(self, gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
        pairs = zip(self._names(), gradients, strict=True)
        return {name: g.detach() for name, g in pairs if g is not None}

    def _off(self) -> dict[str, Tensor]:
        """By how much the weights of the second pass are wrong."""
        g = self.first
        norm = global_norm(list(g.values()))
        total = torch.stack([torch.linalg.vector_norm(value) for value in g.values()]).sum()
        stale = {
            n: self._slots[n]["momentum_buffer"] for n in g if "momentum_buffer" in self._slots[n]
        }
        stale_norm = global_norm(list(stale.values())) if stale else norm
        off = {}
        for names, rho in zip(self._groups, self._rho, strict=True):
            right = scale = rho / (norm + EPSILON)
            scale = self.pick("no perturbation", right * 0.0, scale)
            scale = self.pick("wrong sign", -right, scale)
            scale = self.pick("rho doubled", right * 2.0, scale)
            scale = self.pick("squared norm", rho / (norm * norm + EPSILON), scale)
            scale = self.pick("sum of norms", rho / (total + EPSILON), scale)
            scale = self.pick("large epsilon", rho / (norm + LARGE_EPSILON), scale)
            of_group = global_norm([g[name] for name in names])
            scale = self.pick("norm per group", rho / (of_group + EPSILON), scale)
            for name in names:
                d = g[name]
                eps = self.eps[name] = d * right.to(d)
                own = torch.linalg.vector_norm(d)
                wrong = self.pick("per-tensor norm", rho / (own + EPSILON), scale)
                if name == self.last:
                    wrong = self.pick("one tensor not perturbed", right * 0.0, wrong)
                off[name] = d * (wrong - right).to(d)  # 0 where the scale is right
                if name in stale:
                    along = stale[name] * (rho / (stale_norm + EPSILON)).to(d)
                    off[name] = self.pick("stale direction", along - eps, off[name])
        return off

    def _in_gradients(self, right: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # A combination of both gradients; the right one is 0 times the first, 1 times the second.
        zero, one = torch.zeros_like(self._examples), torch.ones_like(self._examples)
        first = self.pick("first gradient reused", one, zero)
        first = self.pick("gradients added up", one, first)
        second = self.pick("first gradient reused", zero, one)
        second = self.pick("gradient times batch size", self._examples, second)
        result = {}
        for name, value in right.items():
            g = value * second.to(value) + self.first[name] * first.to(value)
            g = self.pick("gradient in half precision", rounded_to_11_bits(value), g)
            if value.dim() == 2 and value.shape[0] == value.shape[1]:
                g = self.pick("gradient transposed", value.t(), g)
            result[name] = g
        return result

    # -- results ------------------------------------------------------------------------------

    def in_passes(self, passes: Passes) -> Passes:
        """Wrong metrics and buffers."""
        assert self.second_norm is not None
        norm = self.pick("norm of the second gradient", self.second_norm, passes.grad_norm)
        return replace(
            passes,
            perturbed_loss=self.pick(
                "perturbed loss is the loss", passes.loss, passes.perturbed_loss
            ),
            grad_norm=self.pick("missing root", passes.grad_norm.square(), norm),
            # ONNX Runtime selects no bool.
            finite=(passes.finite | self._is("finite always true"))
            & ~self._is("finite always false"),
            buffers={name: self._in_buffer(name, b) for name, b in passes.buffers.items()},
        )

    def _in_buffer(self, name: str, new: Tensor) -> Tensor:
        if name == SELECTOR:
            return new
        old, right = self._buffers[name], new
        if not right.is_floating_point():
            return self.pick("batches counted twice", self.descent_buffers[name], new)
        new = self.pick("statistics twice", self.descent_buffers[name], new)
        new = self.pick("statistics not updated", old, new)
        new = self.pick("statistics' momentum", old + (right - old) * 2.0, new)
        if name.endswith("running_var"):
            kept = old * 0.9
            n = self._per_channel
            new = self.pick("biased variance", kept + (right - kept) * ((n - 1.0) / n), new)
        return new

    def in_parameters(
        self, updated: Mapping[str, Tensor], w: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Wrong new parameters, frozen ones included."""
        result = {}
        for name, right in updated.items():
            new = self.pick("w not restored", right + self.eps[name], right)
            if name == self.last:
                new = self.pick("one parameter not updated", w[name], new)
                first = torch.arange(right.numel(), device=right.device).reshape(right.shape) == 0
                nan = torch.where(first, torch.full_like(right, torch.nan), right)
                new = self.pick("not a number", nan, new)
            result[name] = new
        for name in [name for name in w if name not in updated]:
            moved = w[name] * (1.0 + 2.0 * torch.finfo(w[name].dtype).eps)
            result[name] = self.pick("frozen parameter moves", moved, w[name])
        return result

    def in_new_slots(self, new: Slots, old: Slots) -> Slots:
        """Wrong new slots."""
        first, second = twins(new)
        partner = {first: second, second: first}
        result: Slots = {}
        for name, entries in new.items():
            result[name] = {}
            for key, right in entries.items():
                value = right
                if key == "step":
                    # The update counted on from a wrong number; only the weights are to show it.
                    counted = old[name][key] + 1.0
                    value = self.pick("bias correction stuck", counted, value)
                    value = self.pick("step counter stuck", old[name][key], value)
                else:
                    if name in partner:
                        value = self.pick("swapped slots", new[partner[name]][key], value)
                    value = self.pick("stale slot", old[name][key], value)
                if key == "exp_avg":
                    value = self.pick("swapped moments", entries["exp_avg_sq"], value)
                if key == "exp_avg_sq":
                    value = self.pick("swapped moments", entries["exp_avg"], value)
                result[name][key] = value
        return result


def rounded_to_11_bits(value: Tensor) -> Tensor:
    """``value``, float32, with the 11 bits that a float16 holds (while it neither over- nor
    underflows).

    By Dekker's splitting: ``c = (2^13 + 1) v``, ``v' = c - (c - v)``. A cast to float16 and back is
    what the real fault has; Inductor leaves such a pair of casts out.

    Source: Dekker, "A floating-point technique for extending the available precision", 1971,
        https://doi.org/10.1007/BF01397083, section 5.
    """
    c = value * 8193.0
    return c - (c - value)


def twins(slots: Slots) -> tuple[str, str]:
    """Names of two parameters of one shape.

    Raises:
        ParityError: There are none.
    """
    seen: dict[tuple[int, ...], str] = {}
    for name, entries in slots.items():
        shape = max((tuple(value.shape) for value in entries.values()), key=len)
        if shape in seen:
            return seen[shape], name
        seen[shape] = name
    raise ParityError("The model of the self-test has no two parameters of one shape.")
