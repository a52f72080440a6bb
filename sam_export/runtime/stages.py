"""The three stages of a step as calls of a session, so that a pipeline can stand between them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sam_export.artifact.contract import (
    CLIPPED_METRIC,
    GRADIENT,
    MOVED,
    PART,
    PERTURBED_GRADIENT,
    RUNNING,
    SCALED_METRIC,
    STAGES,
    ProgramSpec,
    StepContract,
    TensorSpec,
)
from sam_export.artifact.philox import STEPS_PER_PART
from sam_export.artifact.result import (
    AscentResult,
    DescentResult,
    DeviceValue,
    DeviceValues,
    UpdateResult,
)
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
        results = self._run(spec, tensors + self._given(spec, part, buffers=buffers), self._hyper)
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
        given = self._given(spec, part, buffers=buffers, gradients=gradients)
        results = self._run(spec, tensors + given, values)
        self._set_hyper(values)
        moves = self.semantics.running_stats == "both"
        return DescentResult(
            perturbed_loss=self._value(results["perturbed_loss"]),
            grad_norm=self._value(results["grad_norm"]),
            perturbation_norm=self._value(results["perturbation_norm"]),
            gradients=self._values(results, PERTURBED_GRADIENT),
            buffers=self._values(results, MOVED) if moves else buffers or {},
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
        given = self._given(spec, gradients=gradients, buffers=buffers, ascended=ascended)
        results = self._run(spec, given, values)
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

    @functools.cached_property
    def _arguments(self) -> dict[str, list[_Argument]]:
        """Program to its arguments besides the batch, in the order of its graph inputs."""
        return {
            program.name: [
                _Argument(prefix, name, items, _with_prefix(prefix, self.contract.carried))
                for prefix, name in _ARGUMENTS[program.name].items()
                if (items := _with_prefix(prefix, self.contract.fed(program)))
            ]
            for program in self.contract.programs
            if program.name in STAGES
        }

    def _given(self, spec: ProgramSpec, part: int = 0, **given: Tensors | None) -> list[Any]:
        """What a stage is given besides its batch, in order, after checking it.

        Raises:
            SessionError: Something is missing, unknown, or of another dtype or shape.
        """
        if isinstance(part, bool) or not isinstance(part, int) or not 0 <= part < _MOST_PARTS:
            raise SessionError(f"part={part!r}: expected a number from 0 to {_MOST_PARTS - 1}.")
        values: list[Any] = []
        for argument in self._arguments[spec.name]:
            tensors = given.get(argument.name)
            if argument.prefix == PART:
                values.append(np.array(part, np.int64))
            elif tensors is None and (spec.name, argument.prefix) == ("ascent", RUNNING):
                values += self._engine.current(argument.keys).values()
            else:
                values += self._taken(spec.name, argument, tensors)
        return values

    def _taken(self, call: str, argument: _Argument, given: Tensors | None) -> list[Any]:
        """The tensors of one argument in the order of the graph inputs."""
        name, meaning = argument.name, _MEANINGS[argument.name]
        if given is None:
            raise SessionError(f"{call} needs {name}=...: {meaning}.")
        if not isinstance(given, Mapping):
            raise SessionError(
                f"{name} of {call} is a {type(given).__name__}; expected a dict from names to "
                f"tensors: {meaning}."
            )
        own = isinstance(given, DeviceValues) and given.is_read_by(self._engine.to_numpy)
        if own and given.raws.keys() == argument.known:  # type: ignore[attr-defined]
            # Of this very session: what has the name has the dtype and the shape.
            return [given.raws[key] for key in argument.keys]  # type: ignore[attr-defined]
        wrong = [f"lack {key!r}" for key in argument.keys if key not in given]
        wrong += [f"have {key!r}, which is unknown" for key in given if key not in argument.known]
        if wrong:
            owner = "buffers" if argument.prefix == RUNNING else "trained parameters"
            raise SessionError(
                f"{name} of {call} {wrong[0]}; they are {meaning}, by the names of the {owner}."
            )
        return [
            self._raw(spec, given[key], name, call)
            for spec, key in zip(argument.specs, argument.keys, strict=True)
        ]

    def _raw(self, spec: TensorSpec, value: Any, argument: str, call: str) -> Any:
        """A tensor as the engine takes it: its own objects stay where they are."""
        if isinstance(value, DeviceValue):
            if value.is_read_by(self._engine.to_numpy):
                shape = value.raw.shape
                if tuple(shape() if callable(shape) else shape) == spec.shape:
                    return value.raw
            value = value.numpy()
        if isinstance(value, np.generic):
            value = np.asarray(value)
        check_tensor(spec, value, f"{argument} of {call}: tensor")
        return value

    def _value(self, raw: Any) -> DeviceValue:
        return DeviceValue(raw, self._engine.to_numpy)

    @functools.cached_property
    def _carried(self) -> dict[str, dict[str, str]]:
        """Prefix of results that go to another stage: name of each without it to that with it."""
        outputs = [spec.name for program in self.contract.programs for spec in program.outputs]
        return {
            prefix: {name.removeprefix(prefix): name for name in outputs if name.startswith(prefix)}
            for prefix in (GRADIENT, PERTURBED_GRADIENT, MOVED)
        }

    def _values(self, results: Mapping[str, Any], prefix: str) -> DeviceValues:
        """Results of one kind by the name of the parameter or buffer."""
        raws = {key: results[name] for key, name in self._carried[prefix].items()}
        return DeviceValues(raws, self._engine.to_numpy)


@dataclass(frozen=True)
class _Argument:
    """One argument of a stage.

    Attributes:
        prefix: Of the graph inputs that it becomes.
        name: What a caller calls it.
        specs: Of the graph inputs, in order.
        carried: Of all that it may hold; ``specs`` are those that the stage reads.
    """

    prefix: str
    name: str
    specs: tuple[TensorSpec, ...]
    carried: tuple[TensorSpec, ...]

    @functools.cached_property
    def keys(self) -> tuple[str, ...]:
        """Names of parameters or buffers, in the order of ``specs``."""
        return tuple(spec.name.removeprefix(self.prefix) for spec in self.specs)

    @functools.cached_property
    def known(self) -> frozenset[str]:
        """Names that it may hold."""
        return frozenset(spec.name.removeprefix(self.prefix) for spec in self.carried)


def _with_prefix(prefix: str, specs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(spec for spec in specs if spec.name.startswith(prefix))


_ARGUMENTS = {
    "ascent": {PART: "part", RUNNING: "buffers"},
    "descent": {PART: "part", RUNNING: "buffers", GRADIENT: "gradients"},
    "update": {RUNNING: "buffers", GRADIENT: "ascended", PERTURBED_GRADIENT: "gradients"},
}
"""Stage to its arguments: prefix of the graph inputs to the name, in the order of these inputs."""

_MEANINGS = {
    "buffers": "what the stage before returned as its buffers",
    "gradients": "what the stage before returned as its gradients, or a mean of several",
    "ascended": "the gradients that descent was given, of which this SAM variant makes something",
}
