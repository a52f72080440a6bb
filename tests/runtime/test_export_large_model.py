"""`Session.export_model` of models that are larger than one protobuf message may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from sam_export.errors import ArtifactError
from sam_export.runtime import model_onnx
from tests.runtime.target_cases import images
from tests.runtime.test_export_model import bound, compared, run_onnx, trained


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if protobuf allowed 4000 bytes only."""
    monkeypatch.setattr(model_onnx, "MESSAGE_LIMIT", 4000)


def files_in(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


@pytest.mark.usefixtures("small_limit")
def test_a_large_model_keeps_its_weights_beside_it(tmp_path: Path) -> None:
    session, model, first = trained("onnx", torch.float32)
    path = tmp_path / "model.onnx"
    for _ in range(2):  # the second time over what is there, which is the same
        session.export_model(path)
        name, data = files_in(tmp_path)
        assert name == "model.onnx"
        assert data.startswith("model.onnx.")
        assert data.endswith(".data")
        onnx.checker.check_model(path, full_check=True)
        x, _ = images(7, torch.float32, seed=9)
        compared(run_onnx(path, {"x": x})["output"], model, first, x)
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    offsets = [
        int(entry.value) for t in tensors for entry in t.external_data if entry.key == "offset"
    ]
    assert len(offsets) == len(set(offsets)) > 3
    assert not any(offset % 4096 for offset in offsets)

    session.step(*images(6, torch.float32))
    session.export_model(path)
    _, newer = files_in(tmp_path)  # the old weights are gone
    assert newer != data
    found = run_onnx(path, {"x": x})["output"]
    np.testing.assert_allclose(found, session.evaluate(x), rtol=0, atol=bound(found))


@pytest.mark.usefixtures("small_limit")
def test_a_large_model_that_fails_leaves_the_old_one_whole(
    tmp_path: Path, failing_disk: Callable[[], None]
) -> None:
    session, model, first = trained("onnx", torch.float32)
    path = tmp_path / "model.onnx"
    session.export_model(path)
    before = files_in(tmp_path)
    session.step(*images(6, torch.float32))
    failing_disk()
    with pytest.raises(ArtifactError, match="No space left"):
        session.export_model(path)
    assert files_in(tmp_path) == before
    x, _ = images(7, torch.float32, seed=9)
    compared(run_onnx(path, {"x": x})["output"], model, first, x)


@pytest.mark.usefixtures("small_limit")
def test_a_large_model_that_is_not_loaded_leaves_the_old_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, _, _ = trained("onnx", torch.float32)
    session.export_model(tmp_path / "model.onnx")
    before = files_in(tmp_path)
    session.step(*images(6, torch.float32))

    def refuse(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_onnx, "_load", refuse)
    with pytest.raises(KeyboardInterrupt):
        session.export_model(tmp_path / "model.onnx")
    assert files_in(tmp_path) == before
