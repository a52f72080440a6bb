"""The figure shows what it is given, and drawing it changes nothing outside the file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sam_export.errors import SamExportError
from sam_export.report.plot import plot_training

pytest.importorskip("matplotlib", reason="needs the report extra")

CURVE = [2.3 * 0.97**index for index in range(120)]
PARITY = {"onnx": [1e-7, 2e-7, 3e-7], "torch-compile": [2e-8, 1e-8, 4e-8]}
PALE, DARK = (242, 179, 107), (20, 70, 107)


def pixels_like(path: Path, color: tuple[int, int, int]) -> int:
    from matplotlib.image import imread

    image = (imread(path)[..., :3] * 255).round()
    left = image[:, : image.shape[1] // 2]
    return int((np.abs(left - np.array(color)).max(axis=-1) <= 3).sum())


def test_two_curves_that_coincide_are_both_visible(tmp_path: Path) -> None:
    path = plot_training({"eager": CURVE, "onnx": CURVE}, PARITY, 1e-5, tmp_path / "a" / "x.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    # Counted without the legend, whose samples are some hundred pixels.
    alone = plot_training({"eager": CURVE}, PARITY, 1e-5, tmp_path / "alone.png")
    assert pixels_like(path, PALE) > 2000
    assert pixels_like(path, DARK) > 500
    assert pixels_like(alone, DARK) == 0


def test_a_series_that_differs_makes_another_picture(tmp_path: Path) -> None:
    one = plot_training({"eager": CURVE}, PARITY, 1e-5, tmp_path / "one.png")
    other = plot_training({"eager": CURVE}, {**PARITY, "onnx": [1e-2]}, 1e-5, tmp_path / "two.png")
    assert one.read_bytes() != other.read_bytes()


def test_errors_of_exactly_zero_and_none_finite_are_drawn_without_a_warning(tmp_path: Path) -> None:
    series = {"exact": [0.0, 0.0], "broken": [1e-7, float("nan"), float("inf")]}
    path = plot_training({"eager": CURVE}, series, None, tmp_path / "x.png")
    assert path.stat().st_size > 0


@pytest.mark.parametrize(
    ("curves", "parity"),
    [({}, PARITY), ({"eager": []}, PARITY), ({"eager": CURVE}, {}), ({"eager": CURVE}, {"x": []})],
)
def test_nothing_to_draw_is_an_error(
    tmp_path: Path, curves: dict[str, list[float]], parity: dict[str, list[float]]
) -> None:
    with pytest.raises(SamExportError, match="at least one loss curve"):
        plot_training(curves, parity, 1e-5, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_no_global_state_of_matplotlib_is_touched(tmp_path: Path) -> None:
    program = (
        "import sys, matplotlib\n"
        "before = matplotlib.rcParams.copy()\n"
        "from sam_export.report.plot import plot_training\n"
        f"plot_training({{'a': [1.0, 0.5]}}, {{'b': [1e-7]}}, 1e-5, {str(tmp_path / 'x.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert matplotlib.rcParams.copy() == before\n"
        "assert 'torch' not in sys.modules\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_missing_matplotlib_is_said_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SamExportError, match=r"pip install 'sam_export\[report\]'"):
        plot_training({"eager": CURVE}, PARITY, 1e-5, tmp_path / "x.png")
