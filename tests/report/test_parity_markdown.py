"""The Markdown report, as a renderer of CommonMark with tables shows it."""

from __future__ import annotations

import re
from html import escape, unescape
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from sam_export.errors import ParityError
from sam_export.report.parity_markdown import to_markdown, write_markdown
from tests.report.parity_values import EVIL, bad, good, report, row


def rendered(text: str) -> str:
    return str(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))


def cells(html: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.S)
    return [
        [unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<t[dh].*?</t[dh]>", r)]
        for r in rows
    ]


def test_the_targets_are_a_table() -> None:
    html = rendered(to_markdown(report()))
    assert html.startswith("<h3>Parity with eager PyTorch: ❌ not equal</h3>")
    table = cells(html[: html.index("</table>")])
    assert table == [
        ["target", "verdict", "ran on", "lock-step", "free-running", "drift", "ok/noise/FAIL"],
        ["onnx", "✅ equal", "CPUExecutionProvider", "1.00e-8", "1.00e-6", "×10 per step", "2/1/0"],
        ["torch-compile", "❌ not equal", "not known", "0.002", "1.00e-8", "×1 per step", "1/0/2"],
        ["aot-inductor", "❌ not equal", "not known", "–", "–", "–", "0/0/0"],
    ]


def test_what_differs_is_shown_and_the_rest_is_folded() -> None:
    html = rendered(to_markdown(report()))
    assert "<h4>torch-compile</h4>" in html
    assert "<h4>onnx</h4>" not in html
    name = f"<code>{escape(EVIL, quote=False)}</code>".replace('"', "&quot;")
    assert f"Differs first in lock-step step 2, stage slots: {name}" in html
    items = [unescape(item) for item in re.findall(r"<li>(.*?)</li>", html)]
    assert "worst element: [1, 2]" in items
    assert "found: not finite" in items
    assert "length of the change: 1.25 × eager's" in items
    assert html.count("<details>") == html.count("</details>") == 2
    assert "build: RuntimeError: &lt;i&gt;no&lt;/i&gt; compiler" in html
    differing = cells(html[html.index("2 comparisons that differ") :].split("</table>")[0])
    assert differing[1][0] == EVIL, "the worst one, in one cell"
    assert [len(r) for r in differing] == [8, 8, 8]
    ledger = cells(html[html.rindex("<table>") :])
    assert ["targets", "onnx graphs step.onnx", "ab" * 32] in ledger
    assert "sam-export parity 'a b.py:recipe' &amp;&amp; echo `x`" in html


def test_nothing_from_outside_is_markup() -> None:
    html = rendered(to_markdown(report(bad(name="<img src=x> **b** @all #1"))))
    assert "<script" not in html
    assert "<img" not in html
    assert "<b>" not in html
    assert "<eager>" not in html
    assert "&lt;img src=x&gt; **b** @all #1" in html


def test_a_report_of_equal_targets_is_short() -> None:
    text = to_markdown(report(good(), notes=()))
    assert text.startswith("### Parity with eager PyTorch: ✅ equal\n")
    visible = text[: text.index("<details>")]
    assert len(visible.splitlines()) <= 12
    assert "####" not in text


def test_how_many_rows_are_left_out_is_said() -> None:
    target = bad()
    rows = tuple(row(f"p{i}", "parameter", "lock-step", 1e-3 + i, "FAIL") for i in range(13))
    text = to_markdown(report(type(target)(**{**vars(target), "rows": rows})))
    assert "13 comparisons that differ (10 worst shown, 3 more)" in text
    assert "| `p12` |" in text
    assert "| `p2` |" not in text


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_markdown(report(), tmp_path / "note.md")
    assert (tmp_path / "note.md").read_text() == to_markdown(report())
    with pytest.raises(ParityError, match="cannot be written"):
        write_markdown(report(), tmp_path / "no" / "note.md")
