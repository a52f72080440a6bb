"""Pairing, measuring and judging on arrays made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from sam_export.errors import ParityError
from sam_export.parity.compare import (
    Sample,
    flag_sample,
    measure,
    metric_sample,
    mismatches,
    with_errors,
)
from sam_export.parity.tolerances import Tolerances
from sam_export.parity.verdict import Row, judge_steps, worst_per_step

TOL = Tolerances()
W = np.array([1.0, 2.0, 3.0])


def state(**changes: np.ndarray) -> dict[str, np.ndarray]:
    return {"w": W, "count": np.array(3), **changes}


@pytest.mark.parametrize(
    ("found", "name", "says"),
    [
        ({"w": W}, "count", "missing"),
        (state(extra=W), "extra", "no such tensor"),
        (state(w=W[:2]), "w", "float64[2]"),
        (state(w=W[None]), "w", "float64[1, 3]"),
        (state(w=W.astype(np.float32)), "w", "float32[3]"),
        (state(count=np.array(3.0)), "count", "float64[]"),
        (state(w=np.array([1.0, np.nan, 3.0])), "w", "not finite"),
        (state(w=np.array([1.0, np.inf, 3.0])), "w", "not finite"),
    ],
)
def test_pairing_is_strict(found: dict[str, np.ndarray], name: str, says: str) -> None:
    problems = mismatches(state(), found, found)
    assert list(problems) == [name]
    assert says in problems[name]


def test_a_scalar_slot_may_be_wider_and_a_tensor_slot_may_not() -> None:
    eager = {"slot.step.w": np.float32(1)[None][0:1], "slot.m.w": W.astype(np.float32)}
    graph = {"slot.step.w": np.ones(1), "slot.m.w": W}
    assert list(mismatches(eager, graph, graph)) == ["slot.m.w"]


def test_a_slot_that_eager_has_not_made_must_wait() -> None:
    expected = {"w": W, "slot.m.v": W}
    initial = {**expected, "slot.m.w": np.zeros(3)}
    assert mismatches(expected, initial, initial) == {}
    moved = {**initial, "slot.m.w": np.ones(3)}
    assert list(mismatches(expected, moved, initial)) == ["slot.m.w"]
    made = {**initial, "slot.other.v": np.zeros(3)}  # eager has v's slots: one too many
    assert list(mismatches(expected, made, made)) == ["slot.other.v"]


def test_nan_on_both_sides_is_not_equal() -> None:
    bad = state(w=np.array([1.0, np.nan, 3.0]))
    assert list(mismatches(bad, bad, bad)) == ["w"]
    sample = metric_sample(math.nan, [1.0], math.nan, "float32", 1)
    assert sample.error == math.inf


def measured(delta: float, noise: float, error: float) -> Sample:
    start = {"w": W}
    after = {"w": W + delta}
    runs = [(start, after), (start, {"w": W + delta + noise})]
    samples = measure(start, after, after, runs, 1, TOL)
    found = {"w": W + delta + error}
    return with_errors(samples, {}, after, after, found)["w"]


def judged(*samples: Sample, mode: str = "lock-step", dtype: str = "float64") -> Row:
    (row,) = judge_steps([{"w": s} for s in samples], {"w": "parameter"}, mode, dtype, TOL)  # type: ignore[arg-type]
    return row


def test_the_change_is_compared_and_not_the_weight() -> None:
    row = judged(measured(1e-6, 0.0, 1e-8))
    assert row.verdict == "FAIL", "1e-8 of the weight, but 1 % of its change"
    assert row.relative == pytest.approx(1e-2, rel=1e-3)
    assert row.change == pytest.approx(math.sqrt(3) * 1e-6, rel=1e-6)


@pytest.mark.parametrize(
    ("delta", "noise", "error", "verdict"),
    [
        (1e-2, 0.0, 0.9e-11, "ok"),
        (1e-2, 0.0, 2e-11, "FAIL"),  # above 1e-9 of the change
        (1e-2, 1e-4, 9e-4, "ok"),  # the oracle itself is no closer
        (1e-2, 1e-4, 2e-3, "FAIL"),
        (1e-2, 2e-3, 9e-3, "noise"),  # less than ten floors
        (1e-2, 2e-3, 5e-2, "FAIL"),
        (0.0, 1e-9, 5e-9, "noise"),
        (0.0, 1e-9, 5e-8, "FAIL"),
    ],
)
def test_float64_rule(delta: float, noise: float, error: float, verdict: str) -> None:
    assert judged(measured(delta, noise, error)).verdict == verdict


def test_float32_is_judged_by_eagers_own_distance() -> None:
    sample = measured(1e-2, 1e-7, 9e-7)
    assert judged(sample, dtype="float32").verdict == "ok"
    assert judged(measured(1e-2, 1e-7, 3e-6), dtype="float32").verdict == "FAIL"
    drifted = measured(1e-2, 1e-7, 1.9e-4)
    assert judged(drifted, mode="free-running", dtype="float32").verdict == "ok"
    assert judged(drifted, mode="lock-step", dtype="float32").verdict == "FAIL"
    gone = measured(1e-2, 1e-7, 2.1e-4)
    assert judged(gone, mode="free-running", dtype="float32").verdict == "FAIL"


def test_one_wrong_step_fails_lock_step_and_lucky_noise_does_not() -> None:
    good = measured(1e-2, 1e-5, 1e-5)
    row = judged(good, good, replace(good, error=1e-3), good)
    assert (row.verdict, row.step) == ("FAIL", 3)
    lucky = replace(good, noise=1e-12)
    assert judged(good, lucky, good).verdict == "ok"


def test_free_running_judges_the_last_step_but_no_nan_on_the_way() -> None:
    good = measured(1e-2, 0.0, 0.0)
    off = measured(1e-2, 0.0, 1e-3)
    assert judged(off, good, mode="free-running").verdict == "ok"
    assert judged(good, off, mode="free-running").verdict == "FAIL"
    broken = replace(good, error=math.inf, note="not finite in the target")
    row = judged(broken, good, mode="free-running")
    assert (row.verdict, row.step, row.note) == ("FAIL", 1, "not finite in the target")


def test_integers_flags_and_untrained_tensors_must_be_equal() -> None:
    start = {"n": np.array([1, 2]), "frozen": W, "constant": W}
    after = {"n": np.array([2, 3]), "frozen": W, "constant": W}
    samples = measure(
        start, after, after, [(start, after)], 1, TOL, untrained={"frozen"}, buffers={"constant"}
    )
    ulp = W * (1 + 2 * np.finfo(np.float64).eps)
    for name, wrong in (("n", np.array([2, 4])), ("frozen", ulp), ("constant", ulp)):
        right = with_errors(samples, {}, after, after, after)
        assert {r.verdict for r in judge_steps([right], {}, "lock-step", "float64", TOL)} == {"ok"}
        found = with_errors(samples, {}, after, after, {**after, name: wrong})
        rows = judge_steps([found], {}, "lock-step", "float64", TOL)
        assert [r.name for r in rows if r.verdict == "FAIL"] == [name]
    assert judged(flag_sample(True, False)).verdict == "FAIL"
    assert judged(flag_sample(False, False)).verdict == "ok"


def test_eager_that_is_not_finite_is_no_judge() -> None:
    after = {"w": np.array([np.nan, 1.0, 1.0])}
    with pytest.raises(ParityError, match="'w' is not finite"):
        measure({"w": W}, after, {"w": W}, [({"w": W}, after)], 1, TOL)


def test_worst_per_step_leaves_noise_out() -> None:
    step = {"w": measured(1e-2, 0.0, 1e-4), "v": measured(1e-2, 0.0, 1e-3)}
    assert worst_per_step([step], {"v"}, ()) == (pytest.approx(1e-2),)
    assert worst_per_step([step], (), {"v"}) == (pytest.approx(1e-2),)
    assert worst_per_step([step], (), ()) == (pytest.approx(1e-1),)


def test_squares_of_noise_vary_by_its_square() -> None:
    """A gradient that is nothing but noise, of ten floors, has a square of a hundred."""
    noise, signal = Sample(1e-20, 1e-20, 0.0), Sample(1.0, 1e-20, 0.0)
    for squared, factor, allowed in ((True, 99, True), (True, 101, False), (False, 11, False)):
        sample = replace(noise, squared=squared, error=factor * 1e-20)
        (row,) = judge_steps([{"v": sample}], {}, "free-running", "float64", TOL)
        assert (row.verdict != "FAIL") == allowed, (squared, factor)
    (row,) = judge_steps(
        [{"v": replace(signal, squared=True, error=2e-9)}], {}, "free-running", "float64", TOL
    )
    assert row.verdict == "FAIL"


def test_which_slots_are_squares() -> None:
    names = ("slot.exp_avg_sq.w", "slot.exp_avg.w", "slot.square_avg.w", "w", "exp_avg_sq")
    after = {name: np.ones(3) for name in names}
    start = {name: np.zeros(3) for name in names}
    samples = measure(start, after, after, [(start, after)], 1, TOL)
    assert [samples[name].squared for name in names] == [True, False, True, False, False]
