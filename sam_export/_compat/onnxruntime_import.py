"""What the training builds of ONNX Runtime import, beside themselves, when they are imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_ortmodule() -> Iterator[None]:
    """Keeps the training builds of ONNX Runtime from importing torch, and onnx, at their import.

    They try ``from onnxruntime.training.ortmodule import ORTModule`` only to see whether it is
    there, and go on without it (``capi/onnxruntime_validation.py``, line 69 in 1.19.2). Where torch
    is installed that costs seconds and hundreds of megabytes. ``onnxruntime.training`` can be
    imported as usual afterwards. Nothing replaces it: there is no later release of these builds.
    """
    name = "onnxruntime.training"
    if "onnxruntime" in sys.modules or "torch" in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
