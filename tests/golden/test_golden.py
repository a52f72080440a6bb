"""Old artifacts, and checkpoints of them, still load, and train as they did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sam_export as sx
from sam_export.runtime.detect import target_status

HERE = Path(__file__).parent
KEPT = sorted(path.parent for path in HERE.glob("*/*/manifest.json"))


def test_there_are_some() -> None:
    assert len(KEPT) >= 2


@pytest.mark.parametrize("folder", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
@pytest.mark.parametrize("in_stages", [False, True])
def test_it_trains_as_eager_did(folder: Path, in_stages: bool) -> None:
    """In float64, against the weights of the eager step when the artifact was made."""
    if missing := target_status(folder.name).run:
        pytest.skip(f"{folder.name} needs {missing[0].what}")
    session = sx.load(folder)
    stepping = sx.InStages(session) if in_stages else session
    with np.load(folder.parent / "expected.npz") as expected:
        for index, loss in enumerate(expected["losses"]):
            batch = [expected[f"batch/{index}/{part}"] for part in range(2)]
            assert float(stepping.step(*batch).loss) == pytest.approx(loss, rel=1e-12)
        for name in (name for name in expected.files if name.partition("/")[0] == "state"):
            value = expected[name]
            found = session.state[name.removeprefix("state/")]
            np.testing.assert_allclose(found, value, rtol=1e-11, atol=1e-14, err_msg=name)
        for name in (name for name in expected.files if name.partition("/")[0] == "average"):
            found = session.state[name.replace("/", ".", 1)]
            np.testing.assert_allclose(found, expected[name], rtol=1e-11, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("folder", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_its_checkpoint_goes_on(folder: Path) -> None:
    """Saved after the first step when the artifact was made, by the session of ``onnx``."""
    if missing := target_status(folder.name).run:
        pytest.skip(f"{folder.name} needs {missing[0].what}")
    session = sx.load(folder)
    session.restore(folder.parent / "after_one_step.ckpt")
    assert session.step_count == 1
    with np.load(folder.parent / "expected.npz") as expected:
        batch = [expected[f"batch/1/{part}"] for part in range(2)]
        assert float(session.step(*batch).loss) == pytest.approx(expected["losses"][1], rel=1e-12)
