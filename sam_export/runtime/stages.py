"""The three stages of a step as calls of a session, so that a pipeline can stand between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sam_export.artifact.contract import (
    CLIPPED_METRIC,
    GRADIENT,
    MOVED,
    PERTURBED_GRADIENT,
    RUNNING,
    SCALED_METRIC,
    ProgramSpec,
    StepContract,
    TensorSpec,
)
from sam_export.artifact.philox import STEPS_PER_PART
from sam_export.artifact.result import AscentResult, DescentResult, DeviceValue, UpdateResult
from sam_export.artifact.tree import unflatten
from sam_export.errors import SessionError
from sam_export.runtime.batches import check_tensor, checked_batch, merged_hyper

if TYPE_CHECKING:
    from sam_export.artifact.semantics import Semantics
    from sam_export.runtime.engine import Engine

Tensors = Mapping[str, Any]
"""Parameter or buffer by name: NumPy arrays, torch tensors, or what another stage returned."""

_MOST_PARTS = (1 << 63) // STEPS_PER_PART


class StagedCalls:
    """The stages of a session whose step was captured with ``staged=True``.

    Only `update` changes the session. What stands between two stages is the caller's: a mean over
    several calls (accumulation), a mean over machines, or nothing, and then the three together are
    `Session.step`.
    """

    contract: StepContract
    semantics: Semantics
    _engine: Engine
    _hyper: dict[str, tuple[float, ...]]

    def _program(self, name: str) -> ProgramSpec:
        raise NotImplementedError

    def _run(
        self, program: ProgramSpec, batch: list[Any], hyper: Mapping[str, tuple[float, ...]]
    ) -> dict[str, Any]:
        raise NotImplementedError

    def _stepped(self, hyper: Mapping[str, tuple[float, ...]]) -> None:
        raise NotImplementedError

    def _set_hyper(self, values: Mapping[str, tuple[float, ...]]) -> None:
        raise NotImplementedError

    def ascent(self, *batch: Any, buffers: Tensors | None = None, part: int = 0) -> AscentResult:
        """Loss and gradient of the loss at ``w``.

        Args:
            *batch: Inputs, then targets, as `step` takes them.
            buffers: Of a step in several parts: ``buffers`` that the part before returned, from
                which running statistics go on. None: those of the session.
            part: Which part this is of the batch of the step, over all calls and machines. Parts
                draw other random numbers (dropout), and both passes of a part the same ones.

        Returns:
            Loss, gradients by parameter name, and new buffers. If the loss is not finite, one
            gradient holds NaN, and so does every mean that it becomes part of.

        Raises:
            SessionError: The batch does not fit the contract, or the step has no stages.
        """
        spec = self._program("ascent")
        tensors = checked_batch(batch, self.contract, spec)
        results = self._run(spec, tensors + self._given(spec, part, buffers), self._hyper)
        leaves = [o.name for o in spec.outputs if o.role == "output"]
        outputs = [self._value(results[name]) for name in leaves]
        return AscentResult(
            loss=self._value(results["loss"]),
            gradients=self._values(results, GRADIENT),
            buffers=self._values(results, MOVED),
            outputs=unflatten(self.contract.output_tree, outputs) if leaves else None,
        )

    def descent(
        self,
        *batch: Any,
        gradients: Tensors,
        buffers: Tensors | None = None,
        part: int = 0,
        **hyper: Any,
    ) -> DescentResult:
        """Moves to ``w + eps_w``; loss and gradient of the loss there.

        Args:
            *batch: The same as for `ascent`.
            gradients: ``g``, of which ``eps_w`` is made: what `ascent` returned, or a mean.
            buffers: What the last `ascent` of this step returned (or, in several parts and with
                ``running_stats="both"``, the `descent` before).
            part: As for the `ascent` of this batch.
            **hyper: ``rho=0.05``, as `step` takes it; it is kept.

        Returns:
            Perturbed loss, norms, ``g_adv`` by parameter name, and the buffers for `update`. If
            loss or norm is not finite, one gradient holds NaN.

        Raises:
            SessionError: Something does not fit the contract, or the step has no stages.
        """
        spec = self._program("descent")
        tensors = checked_batch(batch, self.contract, spec)
        values = merged_hyper(self._hyper, hyper, self.contract) if hyper else self._hyper
        given = self._given(spec, part, buffers, {GRADIENT: gradients})
        results = self._run(spec, tensors + given, values)
        self._set_hyper(values)
        moved = self._values(results, MOVED)
        return DescentResult(
            perturbed_loss=self._value(results["perturbed_loss"]),
            grad_norm=self._value(results["grad_norm"]),
            perturbation_norm=self._value(results["perturbation_norm"]),
            gradients=self._values(results, PERTURBED_GRADIENT),
            buffers=moved or dict(buffers or {}),
        )

    def update(
        self,
        gradients: Tensors,
        *,
        buffers: Tensors | None = None,
        ascended: Tensors | None = None,
        **hyper: Any,
    ) -> UpdateResult:
        """Updates the weights with ``g_adv``, and stores the buffers: one step is done.

        Args:
            gradients: ``g_adv``: what `descent` returned, or a mean. Clipping comes after it.
            buffers: What the last `descent` returned.
            ascended: ``g``, as `descent` was given it, where the SAM variant makes something of it
                (GSAM, Friendly SAM).
            **hyper: ``lr=0.1`` and others, as `step` takes them; they are kept.

        Returns:
            ``finite``, and what clipping and loss scaling report. A step that is not finite changes
            nothing, unless the semantics say otherwise.

        Raises:
            SessionError: Something does not fit the contract, the step has no stages, or it is not
                finite and ``semantics.on_nonfinite`` is ``"raise"``.
        """
        spec = self._program("update")
        values = merged_hyper(self._hyper, hyper, self.contract) if hyper else self._hyper
        own = {PERTURBED_GRADIENT: gradients, GRADIENT: ascended}
        results = self._run(spec, self._given(spec, 0, buffers, own), values)
        result = UpdateResult(
            **{
                name: self._value(results[name])
                for name in ("finite", CLIPPED_METRIC, SCALED_METRIC)
                if name in results
            }
        )
        if self.semantics.on_nonfinite == "raise" and not bool(result.finite):
            raise SessionError(
                "The step is not finite: a loss, a norm or a gradient of one of its passes was "
                "not. Nothing was changed. Look at the batches, or lower lr or rho."
            )
        self._stepped(values)
        return result

    # -- what a stage is given --------------------------------------------------------------------

    def _given(
        self,
        spec: ProgramSpec,
        part: int,
        buffers: Tensors | None,
        gradients: Mapping[str, Tensors | None] | None = None,
    ) -> list[Any]:
        """What a stage is given besides its batch, in order, after checking it.

        Raises:
            SessionError: Something is missing, unknown, or of another dtype or shape.
        """
        if isinstance(part, bool) or not isinstance(part, int) or not 0 <= part < _MOST_PARTS:
            raise SessionError(f"part={part!r}: expected a number from 0 to {_MOST_PARTS - 1}.")
        carried = [item for item in self.contract.fed(spec) if item in self.contract.carried]
        sources: dict[str, tuple[str, Tensors | None]] = {RUNNING: ("buffers", buffers)}
        for prefix, given in (gradients or {}).items():
            name = "ascended" if spec.name == "update" and prefix == GRADIENT else "gradients"
            sources[prefix] = (name, given)
        found: dict[str, Any] = {}
        for prefix, (argument, given) in sources.items():
            items = [item for item in carried if item.name.startswith(prefix)]
            if prefix == RUNNING and given is None and spec.name == "ascent":
                names = [item.name.removeprefix(prefix) for item in items]
                found |= {RUNNING + n: value for n, value in self._engine.current(names).items()}
                continue
            found |= self._taken(spec.name, argument, prefix, items, given)
        return [
            np.array(part, np.int64) if item.role == "part" else found[item.name]
            for item in carried
        ]

    def _taken(
        self,
        call: str,
        argument: str,
        prefix: str,
        items: list[TensorSpec],
        given: Tensors | None,
    ) -> dict[str, Any]:
        """Tensors of one argument by their names in the graph."""
        known = {
            spec.name.removeprefix(prefix)
            for spec in self.contract.carried
            if spec.name.startswith(prefix)
        }
        if given is None:
            if items:
                raise SessionError(f"{call} needs {argument}=...: {_MEANINGS[argument]}.")
            return {}
        if not isinstance(given, Mapping):
            raise SessionError(
                f"{argument} of {call} is a {type(given).__name__}; expected a dict from names to "
                f"tensors: {_MEANINGS[argument]}."
            )
        unknown = sorted(set(map(str, given)) - known)
        missing = [item.name.removeprefix(prefix) for item in items]
        missing = [name for name in missing if name not in given]
        if missing or (unknown and items):
            wrong = f"lack {missing[0]!r}" if missing else f"have {unknown[0]!r}, which is unknown"
            raise SessionError(
                f"{argument} of {call} {wrong}; they are {_MEANINGS[argument]}, by the names of "
                f"the {'buffers' if prefix == RUNNING else 'trained parameters'}."
            )
        return {
            item.name: self._raw(
                item, given[item.name.removeprefix(prefix)], f"{argument} of {call}"
            )
            for item in items
        }

    def _raw(self, spec: TensorSpec, value: Any, where: str) -> Any:
        """A tensor as the engine takes it: its own objects stay where they are."""
        if isinstance(value, DeviceValue):
            if value.is_read_by(self._engine.to_numpy):
                return value.raw
            value = value.numpy()
        if isinstance(value, np.generic):
            value = np.asarray(value)
        check_tensor(spec, value, f"{where}: tensor")
        return value

    def _value(self, raw: Any) -> DeviceValue:
        return DeviceValue(raw, self._engine.to_numpy)

    def _values(self, results: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """Results of one kind by the name of the parameter or buffer."""
        return {
            name.removeprefix(prefix): self._value(value)
            for name, value in results.items()
            if name.startswith(prefix)
        }


_MEANINGS = {
    "buffers": "what the stage before returned as its buffers",
    "gradients": "what the stage before returned as its gradients, or a mean of several",
    "ascended": "the gradients that descent was given, of which this SAM variant makes something",
}
