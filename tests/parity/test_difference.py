"""`Difference`: its figures against ones that are computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sam_export.parity.difference import DECADES, STAGES, describe, stage_of, ulp_distance


def test_the_figures_of_a_small_tensor() -> None:
    before = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    expected = np.array([[1.5, 2.0], [3.0, 4.25]])  # changes by 0.5, 0, 0, 0.25
    found = np.array([[1.5, 2.0], [3.5, 4.25]], np.float32)  # by 0.5, 0, 0.5, 0.25
    made = describe("w", "parameters", "lock-step", 3, found, expected, before, bound=0.2)
    assert (made.name, made.stage, made.mode, made.step) == ("w", "parameters", "lock-step", 3)
    assert made.index == (1, 0)
    assert (made.before, made.expected, made.found) == (3.0, 3.0, 3.5)
    assert made.error == 0.5
    assert made.relative == pytest.approx(0.5 / math.sqrt(0.3125), rel=1e-15)
    # (0.25 + 0.0625) over the product of the lengths
    assert made.cosine == pytest.approx(0.3125 / math.sqrt(0.3125 * 0.5625), rel=1e-12)
    assert made.length == pytest.approx(math.sqrt(0.5625 / 0.3125), rel=1e-15)
    # Between 3 and 3.5 float32 has steps of 2**-22.
    assert made.ulp_max == 2**21
    assert made.ulp_median == 0.0
    assert (made.elements, made.over, made.not_finite) == (4, 1, 0)
    # The share is 0.2 / 2, so 0.5 is 5 shares: the bin from 1 to 10.
    assert made.histogram == (3, 0, 0, 0, 0, 1, 0, 0, 0, 0)
    assert len(made.histogram) == len(DECADES) + 1


def test_an_element_that_is_off_by_exactly_its_share_is_within() -> None:
    expected = np.zeros(4)
    made = describe("w", "slots", "lock-step", 1, np.array([0.5, 0, 0, 0]), expected, None, 1.0)
    assert made.over == 0
    assert made.histogram == (3, 0, 0, 0, 1, 0, 0, 0, 0, 0)


def test_the_sign_of_the_change() -> None:
    before = np.array([1.0, 1.0])
    made = describe("w", "slots", "lock-step", 1, before - 0.25, before + 0.5, before, 1e-9)
    assert made.cosine == pytest.approx(-1.0)
    assert made.length == pytest.approx(0.5)


def test_elements_that_are_not_finite_come_first_and_leave_the_others_alone() -> None:
    expected = np.array([1.0, 2.0, 4.0])
    found = np.array([9.0, np.nan, 4.0], np.float32)
    made = describe("w", "parameters", "free-running", 2, found, expected, np.zeros(3), 1.0)
    assert made.index == (1,)
    assert math.isnan(made.found)  # type: ignore[arg-type]
    assert made.error == math.inf
    assert made.relative == math.inf
    assert made.not_finite == 1
    assert made.over == 2
    assert made.cosine == pytest.approx((9 + 16) / math.sqrt((81 + 16) * (1 + 16)))
    assert made.histogram == (1, 0, 0, 0, 0, 0, 1, 0, 0, 1)


def test_what_must_be_equal_has_a_bound_of_zero() -> None:
    found, expected = np.array([3, 5, 5]), np.array([3, 5, 6])
    made = describe("n", "buffers", "lock-step", 1, found, expected, expected, 0.0)
    assert made.histogram == (2, 0, 0, 0, 0, 0, 0, 0, 0, 1)
    assert made.relative is None, "it should not have changed at all"
    assert made.cosine is None
    assert made.length is None
    assert made.ulp_max is None, "integers have no ulps"
    assert made.over == 1


def test_a_scalar_without_a_state_before() -> None:
    made = describe(
        "loss", "loss", "lock-step", 1, np.float32(2.5).reshape(()), np.array(2.0), None, 1e-6
    )
    assert made.index == ()
    assert made.before is None
    assert made.relative == 0.25
    assert made.ulp_max == 2**21  # steps of 2**-22 between 2 and 4


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_ulps_are_counted_one_by_one(dtype: str) -> None:
    start = np.dtype(dtype).type(-3e-7 if dtype == "float16" else 0)
    value = start
    for steps in range(12):
        counted = ulp_distance(np.array([value]), np.array([start]))
        assert counted is not None
        assert counted.tolist() == [steps], "through zero, where the sign changes"
        value = np.nextafter(value, np.dtype(dtype).type(1))


def test_ulps_over_the_whole_range_do_not_overflow() -> None:
    most = np.finfo(np.float64).max
    counted = ulp_distance(np.array([-most]), np.array([most]))
    assert counted is not None
    assert int(counted[0]) == 2 * int(np.float64(most).view(np.int64))
    zeros = ulp_distance(np.array([-0.0]), np.array([0.0]))
    assert zeros is not None
    assert zeros.tolist() == [0]


def test_expected_is_rounded_to_the_dtype_first() -> None:
    found, expected = np.array([1.0], np.float32), np.array([1.0 + 2.0**-25])
    counted = ulp_distance(found, expected)
    assert counted is not None
    assert counted.tolist() == [0]


def test_stages_are_in_the_order_of_the_computation() -> None:
    names = ["bn.running_mean", "w", "slot.momentum_buffer.w", "finite", "stage.g_adv.w",
             "perturbed_loss", "perturbation_norm", "stage.eps.w", "grad_norm", "stage.g.w",
             "loss"]  # fmt: skip
    found = [stage_of(name, {"w"}, "lock-step") for name in reversed(names)]
    assert found == list(STAGES[1:])
    assert stage_of("w", {"w"}, "start") == "start"
