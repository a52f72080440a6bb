"""Learning-rate schedules."""

from __future__ import annotations

import pytest

from sam_export.cli.errors import CommandError
from sam_export.cli.lr_schedule import parse_schedule


@pytest.mark.parametrize(
    ("text", "done", "factor"),
    [
        ("constant", 0.0, 1.0),
        ("constant", 9.5, 1.0),
        ("cosine", 0.0, 1.0),
        ("cosine", 2.5, 0.8535533905932737),
        ("cosine", 5.0, 0.5),
        ("cosine", 10.0, 0.0),
        ("step:3:0.1", 2.99, 1.0),
        ("step:3:0.1", 3.0, 0.1),
        ("step:3:0.1", 6.0, 0.01),
    ],
)
def test_factor(text: str, done: float, factor: float) -> None:
    assert parse_schedule(text).factor(done, 10) == pytest.approx(factor, abs=1e-15)


def test_only_cosine_needs_the_length_of_an_epoch() -> None:
    texts = ["constant", "cosine", "step:1:0.5"]
    assert [parse_schedule(text).within_epoch for text in texts] == [False, True, False]


@pytest.mark.parametrize(
    "text",
    ["", "linear", "cosine:3", "constant:1", "step", "step:3", "step:0:0.1", "step:3:-1",
     "step:3:nan", "step:3:inf", "step:x:0.1", "step:1.5:0.1", "step:3:0.1:2"],
)  # fmt: skip
def test_unknown(text: str) -> None:
    with pytest.raises(CommandError, match="constant, cosine or step:EPOCHS:FACTOR"):
        parse_schedule(text)
