"""Fixtures that several files of this folder share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.ort_stock import exported, made


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the step with that optimizer, exported once."""
    root = tmp_path_factory.mktemp("artifacts")

    @functools.cache
    def folder(name: str) -> Path:
        return exported(made(name), root / name.replace(" ", "_")).path

    return folder
