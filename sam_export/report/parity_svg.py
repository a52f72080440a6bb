"""The pictures of a parity report as SVG text: drift over the steps, histogram of errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby, pairwise

from sam_export.parity.difference import DECADES
from sam_export.report.parity_words import number

_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 40
_LOWEST = -8
"""Decades under the bound beyond which no more of the axis is shown."""

_MARKED = 40
"""With more steps than this, the points of a line get no mark."""

Lines = Mapping[str, Sequence[float | None]]
"""Name of a line to its height at each step; it has a gap where that is None."""


def drift_plot(title: str, lines: Lines, classes: Mapping[str, str]) -> str:
    """Error over bound at each step, on a logarithmic axis, with the band's edge at 1.

    An error of exactly 0 is drawn at the bottom, one that is not finite at the top.

    Args:
        title: What it shows.
        lines: Name of a line to its values, all of one length.
        classes: Name of a line to its CSS class.
    """
    steps = max(len(values) for values in lines.values())
    low, high = _decades(lines)

    def across(step: int) -> float:
        inner = _WIDTH - _LEFT - _RIGHT
        return _LEFT + (inner * step / (steps - 1) if steps > 1 else inner / 2)

    def down(value: float) -> float:
        exponent = low if value <= 0.0 else min(max(math.log10(value), low), high)  # inf: high
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - exponent) / (high - low)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" class="plot">',
        f"<title>{escape(title)}</title><desc>{escape(_described(lines))}</desc>",
        f'<rect class="outside" x="{_LEFT}" y="{_TOP}" width="{_WIDTH - _LEFT - _RIGHT}" '
        f'height="{down(1.0) - _TOP:.1f}"/>',
    ]
    every = max(1, math.ceil((high - low) / 6))
    for exponent in range(low, high + 1):
        if exponent % every == 0:
            y = down(10.0**exponent)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" '
                f'y2="{y:.1f}"/><text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" '
                f'text-anchor="end">{_power(exponent)}</text>'
            )
    for step in _ticks(steps):
        parts.append(
            f'<text class="tick" x="{across(step - 1):.1f}" y="{_HEIGHT - _BOTTOM + 17}" '
            f'text-anchor="middle">{step}</text>'
        )
    parts.append(
        f'<text class="tick" x="{(_LEFT + _WIDTH - _RIGHT) / 2:.1f}" y="{_HEIGHT - 6}" '
        'text-anchor="middle">step</text>'
    )
    edge = down(1.0)
    parts.append(
        f'<line class="band" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{edge:.1f}" y2="{edge:.1f}"/>'
        f'<text class="band-label" x="{_LEFT + 6}" y="{edge - 5:.1f}">bound</text>'
    )
    for name, values in lines.items():
        parts.append(f'<g class="{classes[name]}"><title>{escape(name)}</title>')
        runs = groupby(enumerate(values), key=lambda point: point[1] is None)
        for missing, run in runs:
            if not missing:
                path = " ".join(f"{across(i):.1f},{down(v):.1f}" for i, v in run if v is not None)
                parts.append(f'<polyline points="{path}"/>')
        points = [(across(i), down(v), v) for i, v in enumerate(values) if v is not None]
        if steps <= _MARKED:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y, _ in points]
        parts += [
            f'<text x="{x:.1f}" y="{y + 5:.1f}" text-anchor="middle">▲</text>'
            for x, y, value in points
            if math.isinf(value)
        ]
        parts.append("</g>")
    parts.append("</svg>")
    return "".join(parts)


def swatch(css_class: str) -> str:
    """A short piece of a line, for a legend."""
    return (
        f'<svg viewBox="0 0 28 10" class="swatch" aria-hidden="true"><g class="{css_class}">'
        '<polyline points="1,5 27,5"/><circle cx="14" cy="5" r="2.6"/></g></svg>'
    )


def histogram(counts: Sequence[int]) -> str:
    """Elements by error in units of their share of the bound; beyond 1 the bars are hatched."""
    width, height, base, bar = 460, 150, 104, 42
    left = (width - bar * len(counts)) / 2
    most = max(*counts, 1)
    shown = "; ".join(
        f"{name}: {count}" for name, count in zip(_bins(), counts, strict=True) if count
    )
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" class="plot">',
        "<title>Elements by error, in units of an element&#x27;s share of the bound</title>",
        f"<desc>{escape(shown)}</desc>",
        f'<line class="axis" x1="{left}" x2="{width - left}" y1="{base}" y2="{base}"/>',
    ]
    for index, count in enumerate(counts):
        x = left + bar * index
        # At least two pixels: one wrong element among millions is what one looks for.
        tall = max(2.0, 80 * count / most) if count else 0.0
        kind = "over" if index > DECADES.index(0) else "within"
        parts.append(
            f'<rect class="{kind}" x="{x + 3:.1f}" y="{base - tall:.1f}" width="{bar - 6}" '
            f'height="{tall:.1f}"><title>{escape(_bins()[index])}: {count} elements</title></rect>'
        )
        if count:
            parts.append(
                f'<text class="tick" x="{x + bar / 2:.1f}" y="{base - tall - 4:.1f}" '
                f'text-anchor="middle">{_short(count)}</text>'
            )
    for index, exponent in enumerate(DECADES):
        parts.append(
            f'<text class="tick" x="{left + bar * (index + 1):.1f}" y="{base + 17}" '
            f'text-anchor="middle">{_power(exponent)}</text>'
        )
    edge = left + bar * (DECADES.index(0) + 1)
    parts.append(
        f'<line class="band" x1="{edge:.1f}" x2="{edge:.1f}" y1="8" y2="{base}"/>'
        f'<text class="tick" x="{width / 2}" y="{height - 8}" text-anchor="middle">'
        "|error| of an element ÷ its share of the bound</text></svg>"
    )
    return "".join(parts)


def _decades(lines: Lines) -> tuple[int, int]:
    values = [v for line in lines.values() for v in line if v is not None and 0 < v < math.inf]
    low = math.floor(math.log10(min(values))) if values else -2
    high = math.ceil(math.log10(max(values))) if values else 1
    return max(min(low, -2), _LOWEST), max(high, 1) + (1 if high >= 1 else 0)


def _described(lines: Lines) -> str:
    words = []
    for name, values in lines.items():
        there = [(value, step) for step, value in enumerate(values, 1) if value is not None]
        if there:
            largest, step = max(there)
            words.append(f"{name}: at most {number(largest)} of the bound, in step {step}")
    return "; ".join(words)


def _ticks(steps: int) -> list[int]:
    if steps <= 10:
        return list(range(1, steps + 1))
    stride = next(s for s in _strides() if steps / s <= 8)
    return [1, *range(stride, steps + 1, stride)] if stride > 2 else list(range(1, steps + 1, 2))


def _strides() -> list[int]:
    return [digit * 10**power for power in range(10) for digit in (1, 2, 5)]


def _power(exponent: int) -> str:
    if exponent in (0, 1):
        return str(10**exponent)
    raised = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}"


def _bins() -> list[str]:
    edges = [_power(exponent) for exponent in DECADES]
    middle = [f"{a} to {b}" for a, b in pairwise(edges)]
    return [f"below {edges[0]}", *middle, f"{edges[-1]} or more, or not finite"]


def _short(count: int) -> str:
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if count >= unit:
            size = 1000 if letter == "k" else unit
            return f"{count / size:.3g}{letter}"
    return str(count)
