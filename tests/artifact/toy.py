"""A SAM step of linear regression: its contract, its state and an engine in plain NumPy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_export.artifact.contract import HyperSpec, ProgramSpec, StepContract, TensorSpec
from sam_export.artifact.folder import Lowered, LoweredFile
from sam_export.artifact.semantics import Semantics
from sam_export.runtime.session import Session

State = dict[str, NDArray[Any]]

METRICS = tuple(
    TensorSpec(name, "metric", "bool" if name == "finite" else "float32", ())
    for name in ("loss", "perturbed_loss", "grad_norm", "perturbation_norm", "finite")
)
MODEL = (
    TensorSpec("weight", "parameter", "float32", (1, 3), trainable=True),
    TensorSpec("bias", "parameter", "float32", (1,), trainable=True),
    TensorSpec("seen", "buffer", "int64", ()),
)
MOMENTUM = tuple(
    TensorSpec(
        f"slot.momentum_buffer.{spec.name}",
        "slot",
        "float32",
        spec.shape,
        parameter=spec.name,
        slot="momentum_buffer",
    )
    for spec in MODEL[:2]
)
ADAMW = tuple(
    TensorSpec(
        f"slot.{key}.{spec.name}",
        "slot",
        "float64" if key == "step" else "float32",
        () if key == "step" else spec.shape,
        parameter=spec.name,
        slot=key,
        eager_dtype="float32" if key == "step" else None,
    )
    for spec in MODEL[:2]
    for key in ("step", "exp_avg", "exp_avg_sq")
)
OUTPUT = (TensorSpec("output", "output", "float32", ("batch", 1)),)


def make_contract(**changes: Any) -> StepContract:
    """The contract with momentum, one parameter group and tuple batches; ``changes`` replace."""
    slots = changes.pop("slots", MOMENTUM)
    outputs = changes.pop("outputs", OUTPUT)
    step_outputs = changes.pop("step_outputs", ())
    state = (*MODEL, *slots)
    groups = changes.get("groups", (("weight", "bias"),))
    names = tuple(spec.name for spec in MODEL)
    new = tuple(
        replace(spec, name=f"next.{spec.name}", parameter=None, slot=None) for spec in state
    )
    contract = StepContract(
        state=state,
        hyper=(HyperSpec("lr", (0.1,) * len(groups)), HyperSpec("rho", (0.05,) * len(groups))),
        batch=(
            TensorSpec("x", "input", "float32", ("batch", 3)),
            TensorSpec("target", "target", "float32", ("batch", 1)),
        ),
        batch_kind="tuple",
        dims={"batch": 1},
        programs=(
            ProgramSpec(
                "step",
                (*(spec.name for spec in state), "hyper.lr", "hyper.rho", "x", "target"),
                (*METRICS, *step_outputs, *new),
                {spec.name: spec.name.removeprefix("next.") for spec in new},
            ),
            ProgramSpec("evaluate", (*names, "x"), outputs, {}),
            ProgramSpec("evaluate_loss", (*names, "x", "target"), METRICS[:1], {}),
        ),
        output_tree="tensor",
        groups=groups,
        optimizer="SGD",
    )
    return replace(contract, **changes)


BIG = replace(
    make_contract(slots=()),
    state=tuple(
        TensorSpec(f"w{index}", "parameter", "float32", (1 << 16,), trainable=True)
        for index in range(4)
    ),
    groups=(("w0",),),
    programs=(),
)
"""A contract of 1 MiB of state and no program."""


def random_state(contract: StepContract, seed: int = 0) -> State:
    """Random values of the contract's dtypes and shapes."""
    generator = np.random.default_rng(seed)
    return {
        spec.name: np.asarray(10 * generator.standard_normal(spec.shape)).astype(spec.dtype)
        for spec in contract.state
    }


def make_lowered(contract: StepContract | None = None, **changes: Any) -> Lowered:
    """A lowered step whose files are a few bytes; ``changes`` replace fields."""
    contract = contract or make_contract()
    lowered = Lowered(
        target="numpy",
        contract=contract,
        semantics=Semantics(),
        files={
            program.name: LoweredFile(f"{program.name}.bin", program.name.encode() * 9)
            for program in contract.programs
        },
        state=random_state(contract),
        versions={"sam_export": "0.1.0", "numpy": "2"},
        details={"in_place": {"weight": True, "bias": [1, 2.5, None, "no"]}},
    )
    return replace(lowered, **changes)


def make_session(contract: StepContract | None = None, **changes: Any) -> Session:
    """A session over a `NumpyEngine`, from zeros; ``changes``: engine, semantics, state."""
    contract = contract or make_contract()
    zeros = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in contract.state}
    semantics = changes.get("semantics", Semantics())
    engine = changes.get("engine") or NumpyEngine(guarded=semantics.on_nonfinite != "ignore")
    state = changes.get("state", zeros)
    return Session(engine, contract, semantics, "numpy", "cpu", state)


def example_batch(size: int = 4, seed: int = 1) -> tuple[NDArray[Any], NDArray[Any]]:
    """Inputs and targets of a linear function."""
    x = np.random.default_rng(seed).standard_normal((size, 3)).astype(np.float32)
    return x, (x @ np.array([[1.0], [-2.0], [0.5]], np.float32) + 0.25).astype(np.float32)


def files_of(folder: Path) -> dict[str, str]:
    """Every path below ``folder``, hidden ones too, with a hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def edit_json(path: Path, **changes: Any) -> None:
    """Replaces top-level fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class NumpyEngine:
    """SAM with SGD and momentum 0.9 on mean squared error, in the manner of a real engine."""

    provider = "NumPy"

    def __init__(self, guarded: bool = True) -> None:
        self.guarded = guarded
        self.runs: list[tuple[str, dict[str, Any]]] = []
        self.fails_with: BaseException | None = None
        self._state: State = {}

    def bind(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Keeps copies; C-contiguous ones are part of the bargain."""
        assert all(value.flags.c_contiguous for value in state.values())
        self._state = {name: np.array(value) for name, value in state.items()}

    def read(self, names: Sequence[str]) -> State:
        """Copies of the named state."""
        return {name: np.array(self._state[name]) for name in names}

    def to_numpy(self, value: Any) -> NDArray[Any]:
        """What `run` returns is NumPy already."""
        return np.array(value)

    def run(
        self, program: str, batch: Sequence[Any], hyper: Mapping[str, NDArray[Any]]
    ) -> dict[str, Any]:
        """One program; `fails_with` stands for an engine that breaks in the middle."""
        if self.fails_with is not None:
            raise self.fails_with
        self.runs.append((program, {name: tuple(values) for name, values in hyper.items()}))
        x = np.asarray(batch[0])
        if program == "evaluate":
            return {"output": self._predict(self._state, x)}
        target = np.asarray(batch[1])
        loss, gradient = self._gradient(self._state, x, target)
        if program == "evaluate_loss":
            return {"loss": loss}
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        scale = np.float32(hyper["rho"][0] / (norm + 1e-12))
        shifted = {name: self._state[name] + scale * g for name, g in gradient.items()}
        perturbed_loss, gradient = self._gradient(shifted, x, target)
        finite = np.isfinite([loss, perturbed_loss, norm]).all()
        results = {
            "loss": loss,
            "perturbed_loss": perturbed_loss,
            "grad_norm": norm,
            "perturbation_norm": scale * norm,
            "finite": finite,
            "output": self._predict(self._state, x),
        }
        if finite or not self.guarded:
            self._update(gradient, np.float32(hyper["lr"][0]), len(x))
        return results

    def _update(self, gradient: State, lr: np.float32, count: int) -> None:
        for name, g in gradient.items():
            slot = f"slot.momentum_buffer.{name}"
            self._state[slot] = np.float32(0.9) * self._state[slot] + g
            self._state[name] = self._state[name] - lr * self._state[slot]
        self._state["seen"] = self._state["seen"] + count

    @staticmethod
    def _predict(state: Mapping[str, NDArray[Any]], x: NDArray[Any]) -> NDArray[Any]:
        return x @ state["weight"].T + state["bias"]

    def _gradient(
        self, state: Mapping[str, NDArray[Any]], x: NDArray[Any], target: NDArray[Any]
    ) -> tuple[Any, State]:
        with np.errstate(invalid="ignore", over="ignore"):
            error = self._predict(state, x) - target
            return (error**2).mean(), {
                "weight": 2 * error.T @ x / np.float32(len(x)),
                "bias": 2 * error.mean(0),
            }
