"""The script that tries other people's models: what it says of right, different and refused ones.

The packages themselves are not needed here.
"""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from torch import Tensor, nn

from scripts import third_party_cases, third_party_models
from scripts.third_party_cases import Case


class FixesTheBatch(nn.Module):
    """Only takes four examples once it is a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.zeros(4, 1)


class ReadsAValue(FixesTheBatch):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * float(x.sum())


def batch(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3), torch.randint(2, (count,))


def fours(count: int) -> tuple[Tensor, Tensor]:
    return batch(4)


CASES = {
    "own: linear": Case("own", lambda: nn.Linear(3, 2), batch),
    "own: fixed": Case("own", FixesTheBatch, fours),
    "own: reads": Case("own", ReadsAValue, batch),
}


@pytest.mark.parametrize(
    ("name", "verdict", "size", "reason"),
    [
        ("own: linear", "right", "any", ""),
        ("own: fixed", "right", "fixed", "is symbolic, but the model fixes it to 4"),
        ("own: reads", "refused", "any", "depends on the value of a tensor"),
    ],
)
def test_verdicts(
    name: str, verdict: str, size: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(third_party_cases, "cases", lambda: CASES)
    found = third_party_models.check(name)
    assert (found["verdict"], found["batch"]) == (verdict, size)
    assert found["parameters"] == 8
    assert reason in found["reason"]


def test_a_page_counts_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: "1.2" if name == "own" else version(name)
    )
    rows = [
        {"name": "own: a", "parameters": 1234, "batch": "any", "verdict": "right", "reason": ""},
        {"name": "own: b", "parameters": 8, "batch": "", "verdict": "refused", "reason": "x | y"},
    ]
    page = third_party_models.page(rows, ["own: c"])
    assert "Not run for this page: own: c." in page
    assert "own 1.2. 1 of 2 are right." in page
    assert "| own 1.2 | a | 1,234 | right | any |  |" in page
    assert "x \\| y" in page


def test_without_the_packages_there_is_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(third_party_cases, "cases", dict)
    monkeypatch.setattr("sys.argv", ["third_party_models"])
    assert third_party_models.main() == 2
    assert "None of torchvision, timm, transformers" in capsys.readouterr().err
