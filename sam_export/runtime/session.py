"""`Session`: a loaded step with its training state. One class for all targets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sam_export.artifact.checkpoint import load_checkpoint, save_checkpoint
from sam_export.artifact.contract import (
    CLIPPED_METRIC,
    HYPER,
    METRICS,
    SCALED_METRIC,
    STAGE,
    STAGES,
    STEP,
    ProgramSpec,
    StepContract,
)
from sam_export.artifact.folder import Artifact
from sam_export.artifact.result import DeviceValue, StepResult
from sam_export.artifact.semantics import Semantics
from sam_export.artifact.state_file import differences, first_few, shapes_of
from sam_export.artifact.tree import unflatten
from sam_export.errors import ArtifactError, SessionError
from sam_export.runtime.batches import checked_batch, merged_hyper
from sam_export.runtime.eager_exchange import Progress, read_eager, write_eager
from sam_export.runtime.engine import Engine
from sam_export.runtime.model_file import write_model
from sam_export.runtime.stages import StagedCalls

if TYPE_CHECKING:
    import torch


class Session(StagedCalls):
    """Training state on a device, and the programs that run on it.

    `sam_export.load` makes sessions. Everything that is fed is checked against the contract first;
    a call that raises has changed nothing, not even the hyper-parameters.

    Args:
        engine: What runs the programs; the session binds the initial state to it.
        contract: Names, dtypes and shapes of everything that goes in and out.
        semantics: What one step means.
        target: Name of the target that the programs were lowered to.
        device: Where they run, as it was asked for (``cpu``, ``cuda:0``).
        initial_state: Every state tensor of the contract by name.
        known_rounding: State tensor to how much of a step's change its runtime is known to be off.
        artifact: What the session was loaded from, for `export_model`.

    Raises:
        SessionError: The initial state does not match the contract.
    """

    def __init__(
        self,
        engine: Engine,
        contract: StepContract,
        semantics: Semantics,
        target: str,
        device: str,
        initial_state: Mapping[str, NDArray[Any]],
        known_rounding: Mapping[str, float] | None = None,
        artifact: Artifact | None = None,
    ) -> None:
        self.contract = contract
        self.semantics = semantics
        self.target = target
        self.device = device
        self.known_rounding = dict(known_rounding or {})
        self._engine = engine
        self._artifact = artifact
        self._step_count = 0
        self._hyper = {}
        self._set_hyper({spec.name: spec.defaults for spec in contract.hyper})
        self.set_state(initial_state)
        slots = [spec.name for spec in contract.state if spec.role == "slot"]
        self._first_slots = {name: _compact(initial_state[name]) for name in slots}

    @property
    def provider(self) -> str:
        """What really runs the programs (``CPUExecutionProvider``, ``inductor``)."""
        return self._engine.provider

    @property
    def facts(self) -> dict[str, Any]:
        """What the numbers may depend on: hashes of the graphs, settings of the runtime.

        JSON values; ``graphs`` maps file names to SHA-256, the other keys are the runtime's own.
        """
        return self._engine.facts

    @property
    def step_count(self) -> int:
        """Steps run, over saved and restored runs; a step that was skipped as not finite counts."""
        return self._step_count

    @property
    def hyper(self) -> dict[str, tuple[float, ...]]:
        """Current hyper-parameters, one value per parameter group."""
        return dict(self._hyper)

    @property
    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of all parameters, buffers and slots, by name."""
        return self._engine.read([spec.name for spec in self.contract.state])

    def set_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Makes copies of ``state`` the current one; step count and hyper-parameters stay.

        Which steps of periodic SAM are perturbed goes by ``counter.step`` of the state.

        Raises:
            SessionError: A tensor is missing, unknown, or of another dtype or shape.
        """
        arrays = {name: np.asarray(value, order="C") for name, value in state.items()}
        lines = differences(shapes_of(arrays), self.contract.state)
        if lines:
            raise SessionError(f"The state does not match the contract: {first_few(lines)}.")
        self._bind({spec.name: arrays[spec.name] for spec in self.contract.state})

    def _bind(self, state: Mapping[str, NDArray[Any]]) -> None:
        self._engine.bind(state)
        self._number = int(state[STEP]) if STEP in state else 0

    def step(self, *batch: Any, **hyper: Any) -> StepResult:
        """Runs one step and keeps the new state.

        It is a step of SAM, but for periodic SAM, where only every ``contract.every``-th one is and
        the others are steps of the base optimizer.

        Args:
            *batch: NumPy arrays, torch tensors or ``OrtValue``s, inputs then targets (the ONNX
                targets read what is on their device where it is); or one dict of them where
                the step was captured with dicts.
            **hyper: ``lr=0.05`` for all parameter groups, ``rho=[0.05, 0.1]`` for each. Those
                omitted keep their last value.

        Returns:
            Losses, norms and ``finite``, which stay on the device until they are read.

        Raises:
            SessionError: Batch or hyper-parameters do not fit the contract, or the step is not
                finite and ``semantics.on_nonfinite`` is ``"raise"``.
        """
        program = self._program("base_step" if self._number % self.contract.every else "step")
        tensors = checked_batch(batch, self.contract, program)
        values = merged_hyper(self._hyper, hyper, self.contract) if hyper else self._hyper
        result = self._result(program, self._run(program, tensors, values))
        if self.semantics.on_nonfinite == "raise" and not bool(result.finite):
            raise SessionError(
                f"Step {self._step_count + 1} is not finite (loss {float(result.loss):g}, "
                f"perturbed loss {float(result.perturbed_loss):g}, gradient norm "
                f"{float(result.grad_norm):g}, perturbation norm "
                f"{float(result.perturbation_norm):g}); nothing was changed. Look at the batch, or "
                "lower lr or rho."
            )
        self._stepped(values)
        return result

    def evaluate(self, *inputs: Any, average: bool = False) -> Any:
        """The model's outputs in eval mode at the current weights.

        Args:
            *inputs: The batch's inputs without its targets; or one dict.
            average: At the averaged weights instead, of a step with `EMA`.

        Returns:
            NumPy arrays, in the tuples, lists and dicts that the model returns.

        Raises:
            SessionError: The inputs do not fit the contract, or there is no such program.
        """
        program = self._program("evaluate_average" if average else "evaluate")
        results = self._run(program, checked_batch(inputs, self.contract, program), self._hyper)
        leaves = [self._engine.to_numpy(results[name]) for name in _outputs(program)]
        return unflatten(self.contract.output_tree, leaves)

    def evaluate_loss(self, *batch: Any, average: bool = False) -> float:
        """The loss of a batch in eval mode at the current weights.

        Args:
            *batch: Inputs, then targets, as `step` takes them.
            average: At the averaged weights instead, of a step with `EMA`.

        Raises:
            SessionError: The batch does not fit the contract, or there is no such program.
        """
        program = self._program("evaluate_loss_average" if average else "evaluate_loss")
        results = self._run(program, checked_batch(batch, self.contract, program), self._hyper)
        return float(self._engine.to_numpy(results[program.outputs[0].name]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes state, hyper-parameters and step count to one file, whole or not at all.

        Raises:
            ArtifactError: The disk refuses; a file that was there is still whole.
        """
        save_checkpoint(path, self.state, self._step_count, self._hyper, self.contract)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Continues from a file that `save` wrote, in a session of any target of the same step.

        Raises:
            ArtifactError: The file is missing, damaged, or of another model or optimizer.
        """
        checkpoint = load_checkpoint(path, self.contract)
        self._bind(checkpoint.state)
        self._set_hyper(checkpoint.hyper)
        self._step_count = checkpoint.step_count

    def export_model(self, path: str | os.PathLike[str], average: bool = False) -> None:
        """Writes the model's forward in eval mode, current weights inside, to serve it.

        The ONNX targets write an ``.onnx`` file that any ONNX Runtime runs, ``torchscript`` a
        ``.pt`` for `torch.jit.load`, ``torch-compile`` a ``.pt2`` for `torch.export.load`. Inputs
        and outputs are those of `evaluate`. The file appears whole or not at all.

        Args:
            path: The file; one that is there is replaced.
            average: With the averaged weights instead, of a step with `EMA`.

        Raises:
            SessionError: The target has no such form, or not the one that ``path`` ends in; the
                model draws random numbers in eval mode; or a stock ONNX Runtime cannot load it.
            ArtifactError: The disk refuses, or the artifact of this session is not there any more.
        """
        self._program("evaluate_average" if average else "evaluate")
        if self._artifact is None:
            raise SessionError("This session was not loaded from an artifact.")
        write_model(self._artifact, Path(path), self._engine.read, average)

    def load_into(self, model: Any, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Copies the whole state into an eager model and optimizer, exactly. Needs torch.

        Parameters keep being the same objects. Slots get the dtype that the eager optimizer gives
        them; those that it has not made yet are made. The hyper-parameters go into its groups.

        Args:
            model: A model with the parameters and buffers of the contract; or a `TrainStep`, which
                takes step number, seed and the scale of the loss, too, and goes on drawing the same
                random numbers.
            optimizer: A `SAM` over it, or the base optimizer alone (which has no ``rho`` to set);
                None for a `TrainStep`.

        Raises:
            SessionError: A name, shape, dtype, parameter group or slot differs.
        """
        numbers = Progress(self._hyper, self._step_count, self._number)
        write_eager(self.contract, self.state, numbers, model, optimizer)

    def load_from(self, model: Any, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Takes the whole state over from an eager model and optimizer, exactly. Needs torch.

        A slot that the optimizer has not made yet gets the value it had in the artifact, since
        eager makes it on the first step. From a model and an optimizer, step count and seed stay
        as they are, and so does ``rho`` where the optimizer has none.

        Args:
            model: A model with the parameters and buffers of the contract; or a `TrainStep`, from
                which step number, seed and the scale of the loss are taken, too.
            optimizer: A `SAM` over it, or the base optimizer alone; None for a `TrainStep`.

        Raises:
            SessionError: A name, shape, dtype, parameter group, slot or hyper-parameter differs.
        """
        eager = read_eager(
            self.contract, self._hyper, self._first_slots, self._engine.read, model, optimizer
        )
        self.set_state(eager.state)
        self._set_hyper(eager.hyper)
        if eager.step_count is not None:
            self._step_count = eager.step_count

    def __repr__(self) -> str:
        count = sum(spec.role == "parameter" for spec in self.contract.state)
        hyper = ", ".join(f"{name} {values}" for name, values in self._hyper.items())
        return (
            f"Session({self.target} on {self.device} by {self.provider}; "
            f"{self.contract.optimizer}, {count} parameters; step {self._step_count}; {hyper})"
        )

    def _program(self, name: str) -> ProgramSpec:
        try:
            return self.contract.program(name)
        except ArtifactError as error:
            how = "with staged=True (--staged) " if name in STAGES else ""
            raise SessionError(f"{error} Export the step again {how}to have it.") from error

    def _run(
        self, program: ProgramSpec, batch: list[Any], hyper: Mapping[str, tuple[float, ...]]
    ) -> dict[str, Any]:
        arrays = self._hyper_arrays if hyper is self._hyper else _vectors(hyper)
        read = {name: array for name, array in arrays.items() if HYPER + name in program.reads}
        return self._engine.run(program.name, batch, read)

    def _result(self, program: ProgramSpec, results: Mapping[str, Any]) -> StepResult:
        def value(name: str) -> DeviceValue:
            return DeviceValue(results[name], self._engine.to_numpy)

        names = _outputs(program)
        outputs = unflatten(self.contract.output_tree, list(map(value, names))) if names else None
        stages = {
            spec.name.removeprefix(STAGE): value(spec.name)
            for spec in program.outputs
            if spec.role == "stage"
        }
        metrics = {name: value(name) for name in METRICS}
        metrics |= {n: value(n) for n in (CLIPPED_METRIC, SCALED_METRIC) if n in results}
        return StepResult(**metrics, outputs=outputs, stages=stages)

    def _stepped(self, hyper: Mapping[str, tuple[float, ...]]) -> None:
        """Keeps the hyper-parameters of a step that is done, and counts it."""
        self._set_hyper(hyper)
        self._step_count += 1
        self._number += 1

    def _set_hyper(self, values: Mapping[str, tuple[float, ...]]) -> None:
        if values is not self._hyper:
            self._hyper, self._hyper_arrays = dict(values), _vectors(values)


def _outputs(program: ProgramSpec) -> list[str]:
    return [spec.name for spec in program.outputs if spec.role == "output"]


def _vectors(hyper: Mapping[str, tuple[float, ...]]) -> dict[str, NDArray[Any]]:
    return {name: np.array(values, dtype=np.float64) for name, values in hyper.items()}


def _compact(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that takes no memory where all elements are the same, as in most new slots."""
    bits = np.asarray(array, order="C").view(f"u{array.itemsize}")
    if array.size and bool((bits == bits.flat[0]).all()):
        return np.broadcast_to(np.array(array.flat[0]), array.shape)
    return array.copy()
