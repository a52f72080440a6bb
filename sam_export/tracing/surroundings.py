"""In which modes a step is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from sam_export._compat import tracing


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Every submodule is in eval mode inside, and in its own afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def kernels(portable: bool) -> Iterator[None]:
    """Inside, operators are those that every target can express, or eager's own."""
    with contextlib.ExitStack() as stack:
        if portable:
            backend = torch.nn.attention.SDPBackend.MATH
            stack.enter_context(torch.nn.attention.sdpa_kernel(backend))
            stack.enter_context(tracing.without_mkldnn())
        yield
