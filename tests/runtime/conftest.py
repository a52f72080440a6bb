"""Fixtures that several files of this folder share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sam_export.artifact import state_file
from tests.runtime.ort_stock import exported, made


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the step with that optimizer, exported once."""
    root = tmp_path_factory.mktemp("artifacts")

    @functools.cache
    def folder(name: str) -> Path:
        return exported(made(name), root / name.replace(" ", "_")).path

    return folder


@pytest.fixture(params=["sync", "replace"])
def failing_disk(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], None]:
    """Breaks the disk when called: where a file is synced, or where it gets its name."""

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def break_it() -> None:
        if request.param == "sync":
            for name in ("model_onnx", "model_torchscript", "model_exported"):
                monkeypatch.setattr(f"sam_export.runtime.{name}.sync", fail)
        else:
            monkeypatch.setattr(state_file.os, "replace", fail)

    return break_it
