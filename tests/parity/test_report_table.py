"""The table that a report prints: fits a screen, says where it goes wrong first."""

from __future__ import annotations

from dataclasses import replace

from tests.report.parity_values import bad, good, report, row


def test_six_targets_fit_a_screen() -> None:
    rows = tuple(row(f"layer.{i}.weight", "parameter", "lock-step", 1.0, "FAIL") for i in range(50))
    targets = [replace(bad(name), rows=rows) for name in "abcdef"]
    lines = str(report(*targets)).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 70
    assert sum("3 shown, worst first" in line for line in lines) == 6


def test_the_first_difference_is_told() -> None:
    first = replace(
        bad().differences[0], name="w", note="", not_finite=0, error=0.5, relative=0.25,
        found=1.5, index=(3, 4), ulp_max=1234567, ulp_median=2.5, over=5,
    )  # fmt: skip
    text = " ".join(str(report(replace(bad(), differences=(first,)))).split())
    assert (
        "differs first: lock-step step 2, slots: w worst element [3, 4]: 1.5, expected 0.5, "
        "before 0.25; error 2.5e-01 of the change; cosine 0.875000, length 1.25 times eager's; "
        "ulps: 1.235e+06 at most, 2.5 median; 5 of 6 elements over their share of the bound"
    ) in text


def test_a_difference_without_arrays_says_why() -> None:
    text = str(report(replace(bad(), differences=bad().differences[1:])))
    assert "  differs first: lock-step step 2, parameters: a.weight\n    gone <b>\n" in text


def test_a_long_list_of_noise_is_cut_and_says_so() -> None:
    rows = tuple(row(f"layer.{i}.bias", "parameter", "lock-step", 0.0, "noise") for i in range(50))
    lines = str(report(replace(good(), rows=rows))).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  noise: layer.0.bias"))
    listed = " ".join(lines[at : at + 2])
    shown = listed.count(".bias")
    assert 0 < shown < 50
    assert listed.endswith(f"and {50 - shown} more")
