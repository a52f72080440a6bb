"""A fixed slice of the operator coverage, and that it finds what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scripts import op_coverage
from scripts.op_coverage_cases import Sample, operators, samples

SLICE = [
    "cumsum",
    "cdist",
    "diagonal",
    "nn.functional.avg_pool2d",
    "nn.functional.conv_transpose2d",
    "nn.functional.cross_entropy",
    "nn.functional.interpolate.bilinear",
]


@pytest.mark.parametrize("name", SLICE)
def test_right_for_two_samples(name: str) -> None:
    result = op_coverage.check(name, 2)
    assert (result["right"], result["wrong"], result["unsupported"]) == (2, 0, 0), result["reason"]


def test_samples_differ_in_rank_and_keywords_first() -> None:
    own = samples(operators()["sum"], 4)
    kinds = {(s.parameters[0].dim(), s.call(s.parameters).dim()) for s in own}
    assert len(own) == 4
    assert len(kinds) > 1


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator whose eager run, and only that, has another gradient."""

    def call(parameters: list[Tensor]) -> Any:
        x = parameters[0]
        factor = 2.0 if isinstance(x.detach(), torch._subclasses.FakeTensor) else 2.001
        return factor * x + (2.0 - factor) * x.detach()

    verdict, reason, reference = op_coverage._verdict([Sample([torch.linspace(-1, 1, 5)], call)])
    assert (verdict, "change" in reason) == ("wrong", True)
    assert reference.startswith("wrong: the change of values.0")


def test_the_page_counts() -> None:
    def row(name: str, right: int, wrong: int, unsupported: int) -> dict[str, Any]:
        counts = {"right": right, "wrong": wrong, "unsupported": unsupported}
        return {"name": name, **counts, "reason": "a | b"}

    rows = [
        row("add", 8, 0, 0),
        row("mv", 1, 1, 0),
        row("pdist", 0, 0, 2),
        row("max", 3, 0, 1),
        row("fft.fft", 0, 0, 4),
        row("view_as_complex", 0, 0, 0),
    ]
    text = op_coverage.page(rows, 8)
    assert "| all but those | 4 | 1 (25 %) | 1 | 1 | 1 |" in text
    assert "| `linalg`, `fft`, `special` and kin | 1 | 0 (0 %) | 0 | 1 | 0 |" in text
    assert "\n1 more have no sample" in text
    assert "| `mv` | 1 | 0 | 1 | a \\| b |" in text
    assert "| `add` |" not in text
