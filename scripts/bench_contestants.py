"""The contestants of the benchmark: each makes a function that runs one training step.

The eager loops are written here as a user would write them, over stock ``torch.optim``; they use
nothing of sam_export. Nothing is imported before it is needed: the process of an ONNX session must
not carry torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from scripts.bench_cases import OPTIMIZER, RHO, Case

StepFunction = Callable[[Any, Any], Any]
"""Runs one step on a batch and returns its loss, as something that ``float`` reads."""


@dataclass(frozen=True)
class Contestant:
    """One way to train.

    Attributes:
        name: As in ``--contestants`` and in the table.
        description: For people.
        prepare: Imports what the contestant needs and sets its threads, so that the memory before
            the first step is built holds the imports.
        build: Makes the step function from the case and, for a session, its artifact; for a number
            of threads and a device.
        tensors: Whether batches are torch tensors (else NumPy arrays).
        is_sam: Whether it takes SAM steps (the base optimizer does not).
        target: For a session: the target its artifact is exported to.
        every: For a session: the period of SAM; of `NEVER`, no measured step is one of SAM.
        staged: For a session: whether a step is three calls, of its three stages.
    """

    name: str
    description: str
    prepare: Callable[[int], None]
    build: Callable[[Case, Path | None, int, str], StepFunction]
    tensors: bool
    is_sam: bool = True
    target: str | None = None
    every: int = 1
    staged: bool = False


NEVER = 10**9
"""A period longer than any run: after the first step all are steps of the base optimizer."""


def _prepare_torch(threads: int) -> None:
    import torch
    import torch._dynamo  # torch.optim imports it at its first step; it belongs to the imports

    torch.set_num_threads(threads)


def _prepare_compiler(threads: int) -> None:
    _prepare_torch(threads)
    import torch._inductor.compile_fx  # noqa: F401


def _prepare_torch_session(threads: int) -> None:
    _prepare_compiler(threads)
    import sam_export  # noqa: F401


def _prepare_scripted_session(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    import sam_export  # noqa: F401


def _prepare_onnx_session(threads: int) -> None:
    del threads  # given to the session when it is loaded
    # onnxruntime-training imports torch where it finds it; where this target trains, it would not.
    sys.modules["torch"] = None  # type: ignore[assignment]
    import onnxruntime  # noqa: F401

    import sam_export  # noqa: F401


def _model_and_optimizer(case: Case, device: str) -> tuple[Any, Any]:
    """The case's model on a device, and a stock optimizer over it."""
    from models.optimizers import BASE_OPTIMIZERS

    model = case.model().to(device)
    base_cls, kwargs = BASE_OPTIMIZERS[OPTIMIZER]
    return model, base_cls(model.parameters(), **kwargs)


def sam_loop(model: Any, forward: Any, optimizer: Any, rho: float, criterion: Any) -> StepFunction:
    """The two-pass SAM loop in plain PyTorch, with in-place operations throughout.

    Args:
        model: Owner of the parameters.
        forward: What is called on a batch: the model, or its compiled form.
        optimizer: A stock optimizer over the model's parameters.
        rho: Radius of the perturbation.
        criterion: Loss of output and target.
    """
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = criterion(forward(x), y)
        loss.backward()
        with torch.no_grad():
            gradients = [parameter.grad for parameter in parameters]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            torch._foreach_mul_(gradients, rho / (norm + 1e-12))
            before = [parameter.clone() for parameter in parameters]
            torch._foreach_add_(parameters, gradients)
        optimizer.zero_grad()
        del gradients
        criterion(forward(x), y).backward()
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)
        del before
        optimizer.step()
        return loss.detach()

    return step


def base_loop(model: Any, forward: Any, optimizer: Any, criterion: Any) -> StepFunction:
    """One ordinary training step in plain PyTorch; the arguments are those of `sam_loop`."""
    model.train()

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = criterion(forward(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _eager_sam(case: Case, artifact: Path | None, threads: int, device: str) -> StepFunction:
    del artifact, threads
    model, optimizer = _model_and_optimizer(case, device)
    return sam_loop(model, model, optimizer, RHO, case.loss())


def _eager_base(case: Case, artifact: Path | None, threads: int, device: str) -> StepFunction:
    del artifact, threads
    model, optimizer = _model_and_optimizer(case, device)
    return base_loop(model, model, optimizer, case.loss())


def _compiled_base(case: Case, artifact: Path | None, threads: int, device: str) -> StepFunction:
    del artifact, threads
    import torch

    model, optimizer = _model_and_optimizer(case, device)
    return base_loop(model, torch.compile(model), optimizer, case.loss())


def _compiled_model(case: Case, artifact: Path | None, threads: int, device: str) -> StepFunction:
    del artifact, threads
    import torch

    model, optimizer = _model_and_optimizer(case, device)
    return sam_loop(model, torch.compile(model), optimizer, RHO, case.loss())


def _session(
    case: Case,
    artifact: Path | None,
    threads: int,
    device: str,
    recorded: bool = False,
    staged: bool = False,
) -> StepFunction:
    del case
    import sam_export as sx

    if artifact is None:
        raise ValueError("A session contestant needs the folder of its artifact.")
    cuda = sx.CudaOptions(cuda_graph=True) if recorded else None
    session = sx.load(artifact, device=device, threads=threads, cuda=cuda)
    run = sx.InStages(session).step if staged else session.step

    def step(x: Any, y: Any) -> Any:
        return run(x, y).loss

    return step


REFERENCE = "eager-sam"
"""The contestant that the others are compared with."""

CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(
            REFERENCE, "plain two-pass loop over torch.optim", _prepare_torch, _eager_sam, True
        ),
        Contestant(
            "eager-base", "base optimizer alone, one pass", _prepare_torch, _eager_base, True, False
        ),
        Contestant(
            "compiled-base",
            "base optimizer alone, one pass of torch.compile(model)",
            _prepare_compiler,
            _compiled_base,
            True,
            False,
        ),
        Contestant(
            "compiled-model",
            "torch.compile(model) in the eager SAM loop",
            _prepare_compiler,
            _compiled_model,
            True,
        ),
        Contestant(
            "torch-compile",
            "sam_export session, torch-compile target",
            _prepare_torch_session,
            _session,
            True,
            target="torch-compile",
        ),
        Contestant(
            "torchscript",
            "sam_export session, torchscript target",
            _prepare_scripted_session,
            _session,
            True,
            target="torchscript",
        ),
        Contestant(
            "aot-inductor",
            "sam_export session, aot-inductor target",
            _prepare_scripted_session,
            _session,
            True,
            target="aot-inductor",
        ),
        Contestant(
            "onnx",
            "sam_export session, onnx target, in a process that cannot import torch",
            _prepare_onnx_session,
            _session,
            False,
            target="onnx",
        ),
        Contestant(
            "onnx-training",
            "sam_export session, onnx-training target, in a process that cannot import torch",
            _prepare_onnx_session,
            _session,
            False,
            target="onnx-training",
        ),
        Contestant(
            "ort-artifacts",
            "sam_export session, ort-artifacts target, in a process that cannot import torch",
            _prepare_onnx_session,
            _session,
            False,
            target="ort-artifacts",
        ),
    )
}

PERIODIC = {
    f"{target}-{name}": replace(
        CONTESTANTS[target],
        name=f"{target}-{name}",
        description=f"the same with SAM {words}",
        is_sam=False,
        every=every,
    )
    for target in ("torch-compile", "torchscript", "aot-inductor", "onnx", "onnx-training")
    for name, words, every in (
        ("every-10", "in every tenth step", 10),
        ("base", "in no measured step", NEVER),
    )
}
"""Sessions of periodic SAM, and what their steps between those of SAM cost."""

STAGED = {
    f"{target}-staged": replace(
        CONTESTANTS[target],
        name=f"{target}-staged",
        description="the same, each step as three calls",
        build=partial(_session, staged=True),
        staged=True,
    )
    for target in ("torch-compile", "torchscript", "aot-inductor", "onnx", "onnx-training")
}
"""Sessions that run the three stages, with nothing in between."""

RECORDED = {
    f"{target}-graph": replace(
        CONTESTANTS[target],
        name=f"{target}-graph",
        description="the same, its step recorded as a CUDA graph",
        build=partial(_session, recorded=True),
    )
    for target in ("torch-compile", "onnx", "onnx-training")
}
"""Sessions with CudaOptions(cuda_graph=True), on CUDA only."""

CONTESTANTS |= PERIODIC | STAGED | RECORDED

DEFAULT_CONTESTANTS = tuple(
    name for name in CONTESTANTS if name not in {"compiled-base", *PERIODIC, *STAGED, *RECORDED}
)
"""Those of `scripts/bench` where none are named; `scripts/gpu_check` wants others, too."""
