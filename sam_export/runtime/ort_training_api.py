"""onnxruntime-training's own API, also where torch is not installed."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

from sam_export.runtime.detect import require_training_build


def training_api() -> Any:
    """``onnxruntime.training.api``: its ``Module``, ``Optimizer`` and ``CheckpointState``.

    Only ``onnxruntime.training``'s own ``__init__`` needs torch and onnx, not the three classes: an
    empty package of that name stands in for it while they are imported.

    Raises:
        RuntimeUnavailableError: No training build is installed.
    """
    module = require_training_build()
    name = "onnxruntime.training"
    if name in sys.modules or f"{name}.api" in sys.modules:
        return importlib.import_module(f"{name}.api")
    stand_in = ModuleType(name)
    stand_in.__path__ = [os.path.join(os.path.dirname(str(module.__file__)), "training")]
    sys.modules[name] = stand_in
    try:
        return importlib.import_module(f"{name}.api")
    finally:
        del sys.modules[name]  # whoever needs the rest of it imports the real one


def value_of(parameter: Any, ort: ModuleType) -> Any:
    """The ``OrtValue`` behind a parameter of a checkpoint, not a copy.

    `onnxruntime.training.api.Parameter` has only ``data``, a NumPy array.
    """
    return ort.OrtValue(parameter._parameter.data)
