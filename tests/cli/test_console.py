"""Tables, sizes and the plain progress bar."""

from __future__ import annotations

import io
import sys

import pytest

from sam_export.cli import console


def test_plain_table_aligns_text_left_and_numbers_right() -> None:
    text = console.plain_table(["name", "count"], [["a", "1"], ["bcdef", "1,200"]])
    assert text.splitlines() == [
        "  name   count",
        "  -----  -----",
        "  a          1",
        "  bcdef  1,200",
    ]


def test_plain_table_without_rows() -> None:
    assert console.plain_table(["name"], []).splitlines() == ["  name", "  ----"]


def test_plain_table_refuses_a_short_row() -> None:
    with pytest.raises(ValueError, match="shorter"):
        console.plain_table(["a", "b"], [["1"]])


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (2_000_000, "2.0 MB"),
        (5 * 10**12, "5000.0 GB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert console.format_bytes(count) == text


def test_plain_bar(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    bar = console.PlainProgress(2, "work", stream)
    bar.advance("loss 1")
    bar.advance("loss 2")
    bar.message("epoch done")
    bar.clear()
    drawings = [part.rstrip() for part in stream.getvalue().split("\r") if part.strip()]
    assert drawings[0] == f"work [{'.' * console.BAR_WIDTH}] 0/2"
    assert drawings[-1] == f"work [{'#' * console.BAR_WIDTH}] 2/2 loss 2"
    assert stream.getvalue().endswith("\r")
    assert capsys.readouterr().out == "epoch done\n"


def test_no_bar_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress(3, "work") as bar:
        bar.advance("loss 1")
        bar.message("epoch done")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("epoch done\n", "")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True


@pytest.mark.parametrize("with_rich", [True, False])
def test_bar_on_a_terminal(
    with_rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if with_rich:
        pytest.importorskip("rich")
    monkeypatch.setattr(console, "has_rich", lambda: with_rich)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.progress(2, "work") as bar:
        bar.advance("loss 1")
        bar.advance("[not markup]")
        bar.message("epoch [1] done")
    written = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "work" in written
    assert "2/2" in written
    assert "epoch [1] done" in written + capsys.readouterr().out


@pytest.mark.parametrize("with_rich", [True, False])
def test_one_bar_for_each_phase(with_rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if with_rich:
        pytest.importorskip("rich")
    monkeypatch.setattr(console, "has_rich", lambda: with_rich)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.PhaseBars() as bars:
        bars.show("oracle", 0, 2)
        bars.show("oracle", 2, 2)
        bars.show("onnx", 0, 3)
        bars.show("onnx", 3, 3)
    written = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert written.index("oracle") < written.index("2/2")
    assert written.index("2/2") < written.index("onnx") < written.index("3/3")


def test_stage_says_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    with console.stage("capture"):
        pass
    assert capsys.readouterr().err == "capture: 0.0 s\n"


def test_failed_stage_says_nothing_of_success(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), console.stage("capture"):
        raise ValueError("no")
    assert capsys.readouterr().err == ""
