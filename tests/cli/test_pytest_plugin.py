"""The pytest plugin, in a pytest of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Workplace

TESTS = """
import pytest
import torch
import sam_export as sx
from recipes import recipe


def test_by_name(sam_parity):
    report = sam_parity("recipes.py:recipe", targets=["onnx"], settings={"hidden": 6}, steps=2)
    assert report.num_steps == 2


@pytest.mark.sam_parity(targets=["onnx"], steps=3)
class TestMarked:
    def test_function(self, sam_parity):
        assert sam_parity(recipe).num_steps == 3

    @pytest.mark.sam_parity(steps=1)
    def test_values(self, sam_parity):
        assert sam_parity(recipe()).num_steps == 1


def test_another_step_fails(sam_parity):
    def plain(model, optimizer):
        def step(x, y):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        return step

    sam_parity(recipe, targets=["onnx"], steps=2, reference=plain)


@pytest.mark.sam_parity("onnx")
def test_a_marker_without_keywords(sam_parity):
    pass


def test_no_batch(sam_parity):
    sam_parity((recipe()[0], []), targets=["onnx"])
"""


def test_it_passes_fails_and_says_why(workplace: Workplace, tmp_path: Path) -> None:
    (tmp_path / "recipes.py").write_text(Path(workplace.recipe).read_text())
    (tmp_path / "test_models.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    command = [sys.executable, "-m", "pytest", "-q", "--sam-parity-report", "reports"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    text = " ".join(done.stdout.split())
    assert "2 failed, 3 passed" in text, done.stdout + done.stderr
    assert "1 error" in text, done.stdout
    assert "there is no perturbation: this is the base optimizer alone" in text
    assert "the marker takes keywords only" in text
    assert "check_parity was given no batch" in text
    written = {path.name for path in (tmp_path / "reports").iterdir()}
    assert "test_models.py_test_by_name.html" in written
    report = json.loads((tmp_path / "reports" / "test_models.py_test_by_name.json").read_text())
    assert report["ok"] is True
    assert list((tmp_path / ".pytest_cache" / "d" / "sam_export").iterdir())


def test_it_is_there_without_torch_being_imported() -> None:
    """Every pytest run loads it, so it must be light."""
    script = "import sys, sam_export.cli.pytest_plugin; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--fixtures", "-q"], capture_output=True, text=True
    )
    if "sam_parity" not in done.stdout:
        pytest.fail("the plugin is not installed: pip install -e . again")
