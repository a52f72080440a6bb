"""The series of each tensor, and how fast errors grow."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sam_export.parity.series import growth, series_of
from sam_export.parity.verdict import Row


def row(step: int, error: float, bound: float = 1.0) -> Row:
    verdict = "ok" if error <= bound else "FAIL"
    return Row("w", "parameter", "free-running", step, 2.0, error, 0.5, error / 2, bound, verdict)  # type: ignore[arg-type]


def test_growth_is_the_slope_of_the_logarithm() -> None:
    assert growth([1e-9, 1e-8, 1e-7, 1e-6]) == pytest.approx(1.0)
    errors = [3e-7, 1e-7, 8e-7, 2e-6, 9e-7]
    slope = np.polyfit(np.arange(5), np.log10(errors), 1)[0]
    assert growth(errors) == pytest.approx(slope, rel=1e-3)


def test_growth_leaves_out_what_has_no_logarithm() -> None:
    assert growth([0.0, None, 1e-6, math.inf, 1e-4, 1e-3]) == pytest.approx(1.0)
    assert growth([1e-6, 1e-5, 0.0]) is None


def test_a_series_has_a_place_for_every_step() -> None:
    rows = {"w": [row(2, 0.1), row(3, 5.0), row(4, 0.2), row(5, 7.0)]}
    (series,) = series_of(rows, 6)
    assert series.ratio == (None, 0.1, 5.0, 0.2, 7.0, None)
    assert series.relative == (None, 0.05, 2.5, 0.1, 3.5, None)
    assert series.absent == (1, 6)
    assert series.first_over == 3
    assert series.mode == "free-running"


def test_an_error_that_has_no_size_is_infinite_and_not_absent() -> None:
    (series,) = series_of({"w": [row(1, math.inf)]}, 1)
    assert series.ratio == (math.inf,)
    assert series.absent == ()
    assert series.first_over == 1
