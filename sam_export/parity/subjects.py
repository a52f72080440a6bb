"""What is put to the test: sessions over artifacts, each in a process of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sam_export.artifact.folder import Artifact, open_artifact
from sam_export.artifact.state_file import differences, shapes_of
from sam_export.errors import ArtifactError
from sam_export.parity.artifacts import artifact_for
from sam_export.parity.child import ChildSession
from sam_export.parity.in_stages import InStages
from sam_export.parity.oracle_batch import Batch
from sam_export.parity.rollout import Run
from sam_export.runtime.cuda_options import CudaOptions
from sam_export.step.hyper import baked_of
from sam_export.step.train_step import TrainStep
from sam_export.tracing.captured_step import CapturedStep


@contextmanager
def built(
    captured: CapturedStep,
    target: str,
    device: str,
    cache: Path | None,
    isolate: bool,
    cuda: CudaOptions | None = None,
) -> Iterator[Run]:
    """A run over the artifact of a captured step; a failure to build or load is the run's error.

    Args:
        captured: The step.
        target: Name of the target.
        device: Where it runs.
        cache: Where artifacts are kept, see `artifacts.artifact_for`.
        isolate: Whether it runs in a process of its own.
        cuda: Options for a CUDA device.
    """
    run = Run(target, _Nothing())
    folder: Path | None = None
    with run.guarded("build"):
        folder = artifact_for(captured, target, device, cache)
        run.artifact = folder
        run.session = _opened(folder, device, isolate, bool(captured.random_ops), cuda)
    try:
        yield run
    finally:
        _close(run)
        if cache is None and folder is not None:
            shutil.rmtree(folder.parent, ignore_errors=True)


@contextmanager
def existing(
    name: str,
    folder: Path,
    step: TrainStep,
    device: str,
    isolate: bool,
    notes: list[str],
    cuda: CudaOptions | None = None,
    in_stages: bool = False,
) -> Iterator[Run]:
    """A run over an artifact that is there already, with the step's own ``lr`` and ``rho``.

    Args:
        name: For the report.
        folder: The artifact.
        step: What it is compared with.
        device: Where it runs.
        isolate: Whether it runs in a process of its own.
        notes: Gets a line for each thing in which the artifact differs from the step by choice.
        cuda: Options for a CUDA device.
        in_stages: Whether each step is taken in its three stages.
    """
    run = Run(name, _Nothing())
    with run.guarded("open"):
        artifact = open_artifact(folder)
        if not in_stages:  # has been said
            notes += [f"{name}: {line}" for line in other_choices(artifact, step)]
        hyper = step.hyper([spec.name for spec in artifact.contract.hyper])
        draws = bool(artifact.details.get("random_ops"))
        session = _opened(folder, device, isolate, draws, cuda, hyper, in_stages)
        run.artifact, run.session = folder, session
    try:
        yield run
    finally:
        _close(run)


def has_stages(folder: Path) -> bool:
    """Whether an artifact's steps can be taken in stages; False where it cannot be read."""
    try:
        contract = open_artifact(folder).contract
    except ArtifactError:
        return False
    return bool(contract.carried) and contract.every == 1


def other_choices(artifact: Artifact, step: TrainStep) -> list[str]:
    """In what an artifact was made for another step than this one, a line for each."""
    lines = []
    own, other = step.semantics.to_dict(), artifact.semantics.to_dict()
    for field in own:
        if own[field] != other.get(field):
            lines.append(f"exported with {field}={other.get(field)!r}, the step has {own[field]!r}")
    base = type(step.optimizer.base_optimizer).__name__
    if artifact.contract.optimizer != base:
        lines.append(f"exported with {artifact.contract.optimizer}, the step has {base}")
    hyper = step.hyper([spec.name for spec in artifact.contract.hyper])
    for spec in artifact.contract.hyper:
        wanted = tuple(hyper.get(spec.name, ()))
        if tuple(spec.defaults) != wanted:
            lines.append(
                f"exported with {spec.name} {_listed(spec.defaults)}; compared with "
                f"{_listed(wanted)}, as the step has it"
            )
    for index, (made, now) in enumerate(
        zip(artifact.contract.baked, baked_of(step.optimizer, hyper), strict=False)
    ):
        lines += [
            f"exported with {name}={value!r} in group {index}, the step has {now.get(name)!r}"
            for name, value in made.items()
            if now.get(name) != value
        ]
    state = artifact.state()
    named = {**dict(step.model.named_parameters()), **dict(step.model.named_buffers())}
    start = {name: value.detach().cpu().numpy() for name, value in named.items()}
    specs = [spec for spec in artifact.contract.state if spec.role in ("parameter", "buffer")]
    unlike = differences(shapes_of(start), specs)
    if not unlike:
        moved = [name for name, value in start.items() if not np.array_equal(value, state[name])]
        if moved:
            lines.append(
                f"holds other values of {len(moved)} tensors ({', '.join(moved[:3])}, …); compared "
                "from where the step is"
            )
    return lines


def with_unseen_size(batches: Sequence[Batch], num_steps: int, multiple: int = 1) -> list[Batch]:
    """The batches, and where all are of one size, a smaller one among the first ``num_steps``.

    Args:
        batches: As the user gave them.
        num_steps: How many are run.
        multiple: What the size of each has to be a multiple of.
    """
    from sam_export.parity.disturb import examples, map_batch

    found = list(batches)
    sizes = {examples(batch) for batch in found}
    count = sizes.pop()
    if sizes or count < 4 * multiple or num_steps < 2:
        return found
    fewer = (count // multiple // 2 + 1) * multiple
    small = map_batch(found[0], lambda v: v[:fewer] if len(v.shape) and len(v) == count else v)
    found.insert(min(len(found), num_steps - 1), small)
    return found


class _Nothing:
    """Stands for a session that could not be made."""

    state: Mapping[str, Any] = {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        raise RuntimeError("there is no session")

    def step(self, *batch: Any) -> Any:
        raise RuntimeError("there is no session")


class _WithHyper:
    """A session of this process that takes the same hyper-parameters at every step."""

    def __init__(self, session: Any, hyper: Mapping[str, Any]) -> None:
        self._session, self._hyper = session, dict(hyper)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def step(self, *batch: Any, **hyper: Any) -> Any:
        return self._session.step(*batch, **{**self._hyper, **hyper})


def _opened(
    folder: Path,
    device: str,
    isolate: bool,
    draws: bool,
    cuda: CudaOptions | None,
    hyper: Mapping[str, Any] | None = None,
    in_stages: bool = False,
) -> Any:
    if isolate:
        threads = torch.get_num_threads()
        return ChildSession(folder, device, threads, draws, hyper, cuda, in_stages)
    from sam_export.api import load

    session: Any = load(folder, device=device, cuda=cuda)
    session = InStages(session) if in_stages else session
    return _WithHyper(session, hyper) if hyper else session


def _close(run: Run) -> None:
    if isinstance(run.session, ChildSession):
        run.session.close()


def _listed(values: Sequence[float]) -> str:
    return " / ".join(f"{value:g}" for value in values)
