"""The heat map of a parity report: tensors by steps, as an HTML table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from sam_export.report.parity_words import Values, number, ratios

ROWS = 40
"""Tensors that a heat map shows; how many are left out is said."""

COLUMNS = 60
"""Columns that it has at most; beyond it one column stands for the worst of several steps."""

_LEVELS = (
    (0.0, "h0", "exactly 0"),
    (1e-3, "h1", "to 0.001"),
    (1e-2, "h2", "to 0.01"),
    (1e-1, "h3", "to 0.1"),
    (1.0, "h4", "to 1: within the bound"),
    (10.0, "h5", "to 10: outside"),
    (1e3, "h6", "to 1000"),
)
_HIGHEST = ("h7", "more, or not finite")
_MARK = "×"
"""Outside the band a cell also has a mark, for those who cannot tell the colours apart."""


def heat_map(target: Values, mode: str) -> str:
    """The table of one mode; empty text where nothing was compared in it."""
    every = [series for series in target["series"] if series["mode"] == mode]
    if not every:
        return ""
    verdicts = {row["name"]: row["verdict"] for row in target["rows"] if row["mode"] == mode}
    ordered = sorted(
        every,
        key=lambda series: (verdicts.get(series["name"]) != "FAIL", -_worst(ratios(series))),
    )
    shown = ordered[:ROWS]
    steps = max(len(series["ratio"]) for series in every)
    width = math.ceil(steps / COLUMNS)
    starts = range(0, steps, width)
    caption = f"{mode.capitalize()}: error ÷ bound of each tensor and metric at each step"
    if width > 1:
        caption += f"; a column is the worst of {width} steps"
    if len(every) > len(shown):
        caption += f"; the {len(shown)} worst rows, {len(every) - len(shown)} more are not shown"
    stride = next(s for s in (1, 2, 5, 10, 20) if len(starts) / s <= 12)
    head = "".join(
        f'<th scope="col">{start + 1 if index % stride == 0 else ""}</th>'
        for index, start in enumerate(starts)
    )
    rows = "".join(
        _row(series, verdicts.get(series["name"], ""), starts, width) for series in shown
    )
    # Not a <caption>: that is as narrow as the table, which may have three columns.
    return (
        f'<div><p class="small">{escape(caption)}.</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="heat"><thead><tr><th scope="col">step</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def heat_legend() -> str:
    """What the colours and marks mean."""
    items = [*((css, text) for _, css, text in _LEVELS), _HIGHEST]
    cells = "".join(
        f'<li><span class="cell {css}">{_mark(css)}</span> {escape(text)}</li>'
        for css, text in items
    )
    return f'<ul class="legend" aria-label="Colours: error ÷ bound">{cells}</ul>'


def _row(series: Values, verdict: str, starts: range, width: int) -> str:
    cells = []
    at_step = ratios(series)
    for start in starts:
        there = [
            (ratio, index)
            for index, ratio in enumerate(at_step[start : start + width], start)
            if ratio is not None
        ]
        if not there:
            cells.append("<td></td>")
            continue
        ratio, at = max(there)
        relative = series["relative"][at]
        css = _level(ratio)
        title = f"step {at + 1}: {number(ratio)} of the bound, relative {number(relative)}"
        cells.append(f'<td class="{css}" title="{title}">{_mark(css)}</td>')
    name = escape(series["name"])
    word = {"FAIL": " <b>FAIL</b>", "noise": " <i>noise</i>"}.get(verdict, "")
    head = f'<th scope="row" title="{name}"><span><bdi>{name}</bdi></span>{word}</th>'
    return f"<tr>{head}{''.join(cells)}</tr>"


def _level(ratio: float) -> str:
    return next((css for edge, css, _ in _LEVELS if ratio <= edge), _HIGHEST[0])


def _mark(css: str) -> str:
    return _MARK if css in ("h5", "h6", "h7") else ""


def _worst(values: Sequence[float | None]) -> float:
    return max((value for value in values if value is not None), default=0.0)
