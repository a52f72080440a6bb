"""A parity report as one HTML page that needs nothing from the network, and no script."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from html import escape
from typing import Any

from sam_export.parity.report import ParityReport
from sam_export.parity.text_file import write_text
from sam_export.report import parity_svg
from sam_export.report.parity_heat import heat_legend, heat_map
from sam_export.report.parity_laws import broken_laws, laws_section, reference_sentence
from sam_export.report.parity_style import STYLE
from sam_export.report.parity_words import (
    MODE_WORDS,
    MODES,
    ONLY_FREE,
    Values,
    as_values,
    badness,
    counts,
    difference_facts,
    facts_sentence,
    flattened,
    growth_words,
    largest,
    number,
    ratios,
    stage_states,
    verdict_sentence,
    where,
)

_GROUPS = {
    "metric": "metrics",
    "slot": "slots",
    "parameter": "parameters",
    "buffer": "buffers",
    "stage": "gradients and perturbations",
}
"""Role to the line of a drift plot that it belongs to."""

_ROWS = 2000
"""Rows of the table of all comparisons; how many are left out is said."""

_LEDGER = {
    "seeds": "Seeds",
    "threads": "Threads",
    "versions": "Versions",
    "hardware": "Hardware",
    "numerics": "Switches of torch",
    "environment": "Environment",
}

# Nothing may be loaded, from anywhere; the empty icon keeps browsers from asking a server for one.
_HEAD = (
    '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
    '<link rel="icon" href="data:,">'
)


def write_html(report: ParityReport | Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the page, whole or not at all.

    Args:
        report: The report, or the values of its JSON form.
        path: The file; its folder exists.

    Raises:
        ParityError: The file cannot be written, or the values are of another format.
    """
    write_text(path, to_html(report))


def to_html(report: ParityReport | Mapping[str, Any]) -> str:
    """The page as text: verdict, targets, drift, heat maps, all numbers, ledger, command.

    Raises:
        ParityError: The values are of another format than this version's.
    """
    values = as_values(report)
    word = "EQUAL" if values["ok"] else "NOT EQUAL"
    failed_first = sorted(enumerate(values["targets"]), key=lambda item: item[1]["ok"])
    parts = [
        f'<!doctype html><html lang="en"><head>{_HEAD}<title>Parity: {word}</title>',
        f"<style>{STYLE}</style></head><body><main>",
        _verdict(values),
        _summary(values),
        *(_target(index, target) for index, target in failed_first),
        laws_section(values),
        _tolerances(values),
        _ledger(values),
        f'<h2 id="again">Run it again</h2><pre><code>{escape(values["command"])}</code></pre>',
        "</main></body></html>\n",
    ]
    return "".join(parts)


def _verdict(values: Values) -> str:
    ok = values["ok"]
    lines = [f"<p>{escape(verdict_sentence(values))}</p>"]
    for target in values["targets"]:
        if target["error"] is not None:
            lines.append(f"<p><b>{escape(target['name'])}</b>: {escape(target['error'])}</p>")
        if target["differences"]:
            first = target["differences"][0]
            lines.append(
                f"<p><b>{escape(target['name'])}</b> differs first {escape(where(first))}: "
                f'<span class="name">{escape(first["name"])}</span></p>'
            )
    said = [*broken_laws(values), reference_sentence(values).rstrip(".")]
    lines += [f"<p>{escape(text)}.</p>" for text in said if text]
    lines += [f"<p>Note: {escape(note)}.</p>" for note in values["notes"]]
    return (
        "<header><h1>Parity of a SAM training step with eager PyTorch</h1>"
        f'<div class="verdict {"ok" if ok else "bad"}">'
        f'<p class="word">{"✓ Equal" if ok else "✗ Not equal"}</p>{"".join(lines)}</div>'
        f'<p class="soft small">{escape(facts_sentence(values))}</p></header>'
    )


def _summary(values: Values) -> str:
    heads = (
        "target",
        "verdict",
        "ran on",
        "worst lock-step error",
        "worst free-running error",
        "drift",
        "ok / noise / FAIL",
        "time",
    )
    head = "".join(
        f'<th scope="col"{_numeric(index)}>{name}</th>' for index, name in enumerate(heads)
    )
    rows = []
    for index, target in enumerate(values["targets"]):
        counted = counts(target["rows"])
        cells = (
            _word(target["ok"]),
            escape(target["provider"] or "not known"),
            largest(target["lock_step"]),
            largest(target["free_running"]),
            growth_words(target["growth"]),
            f"{counted['ok']} / {counted['noise']} / {counted['FAIL']}",
            f"{target['seconds']:.1f} s",
        )
        body = "".join(
            f'<td data-label="{heads[at]}"{_numeric(at)}>{cell}</td>'
            for at, cell in enumerate(cells, 1)
        )
        name = f'<a href="#target-{index}">{escape(target["name"])}</a>'
        rows.append(f'<tr><th scope="row">{name}</th>{body}</tr>')
    return (
        f'<h2>Targets</h2><table class="wide summary"><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table><p class="soft small">Errors are L2 distances of '
        "the change of a tensor from the change in the float64 oracle, as parts of that change; "
        "tensors whose change is noise are left out. Drift: by what factor the largest "
        "free-running error grows in one step, fitted over all steps.</p>"
    )


def _target(index: int, target: Values) -> str:
    parts = [f"<section id=target-{index}><h2>{escape(target['name'])}: {_word(target['ok'])}</h2>"]
    if target["error"] is not None:
        parts.append(f"<pre><code>{escape(target['error'])}</code></pre>")
    if target["known_rounding"]:
        parts.append(
            f"<p>The bounds allow for the runtime&#x27;s own rounding, up to "
            f"{number(target['known_rounding'])} of a change, as its manifest says.</p>"
        )
    differences = target["differences"]
    if differences:
        parts.append("<h3>Where it differs first</h3>" + _difference(target, differences[0]))
        if differences[0]["mode"] == "free-running":
            parts.append(f"<p>{escape(ONLY_FREE)}</p>")
    if differences[1:]:
        failed = {row["name"] for row in target["rows"] if row["verdict"] == "FAIL"}
        said = f"{len(differences) - 1} more of {len(failed)} tensors and metrics that differ"
        others = "".join(_difference(target, item) for item in differences[1:])
        parts.append(f"<details><summary>{said}</summary>{others}</details>")
    if target["series"]:
        parts += [_drift(target), _heat(target), _table(target)]
    return "".join(parts) + "</section>"


def _difference(target: Values, difference: Values) -> str:
    facts = "".join(
        f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>"
        for label, text in difference_facts(difference)
    )
    stages = ""
    if difference is target["differences"][0] and difference["mode"] != "start":
        words = {"differs": "✗", "ok": "✓", "none": "–"}
        items = "".join(
            f'<li class="{state}">{words[state]} {stage}</li>'
            for stage, state in stage_states(target, difference)
        )
        stages = (
            f'<p class="small soft">Stages of that step, in the order in which they are computed '
            f"(✓ within the bound, ✗ differs, – not compared):</p>"
            f'<ol class="stages">{items}</ol>'
        )
    picture = ""
    if difference["histogram"] and difference["elements"] > 1:
        picture = (
            "<figure><figcaption>Elements by size of the error</figcaption>"
            f"{parity_svg.histogram(difference['histogram'])}</figure>"
        )
    return (
        f'<div class="first"><h4 class="name">{escape(difference["name"])}</h4>'
        f'<p class="small">{escape(where(difference))}</p>{stages}'
        f'<div class="split"><dl>{facts}</dl>{picture}</div></div>'
    )


def _drift(target: Values) -> str:
    roles = {row["name"]: row["role"] for row in target["rows"]}
    plots, used = [], set()
    for mode in MODES:
        grouped: dict[str, list[list[float | None]]] = {}
        for series in target["series"]:
            if series["mode"] == mode:
                group = _GROUPS.get(roles.get(series["name"], ""), "buffers")
                grouped.setdefault(group, []).append(ratios(series))
        lines = {
            name: [_max(column) for column in zip(*grouped[name], strict=True)]
            for name in _GROUPS.values()
            if name in grouped
        }
        if not lines:
            continue
        used |= set(lines)
        classes = {name: f"l{index}" for index, name in enumerate(_GROUPS.values())}
        plots.append(
            f"<figure><figcaption>{escape(MODE_WORDS[mode].capitalize())}</figcaption>"
            f"{parity_svg.drift_plot(MODE_WORDS[mode].capitalize(), lines, classes)}</figure>"
        )
    legend = "".join(
        f"<li>{parity_svg.swatch(f'l{index}')} worst of the {name}</li>"
        for index, name in enumerate(_GROUPS.values())
        if name in used
    )
    return (
        '<h3>Drift</h3><p class="soft small">Error of each step ÷ the error that would pass, on a '
        "logarithmic axis. Above the line a tensor is outside its band. Free-running, parameters, "
        "slots and buffers are judged by the last step, metrics by every one. ▲ is not finite; "
        "the lower edge also holds what is exactly 0.</p>"
        f'<div class="split">{"".join(plots)}</div><ul class="legend">{legend}</ul>'
    )


def _heat(target: Values) -> str:
    maps = "".join(heat_map(target, mode) for mode in MODES)
    open_ = "" if target["ok"] else " open"
    return (
        f"<h3>Heat map</h3>{heat_legend()}<details{open_}><summary>Tensors and metrics by step"
        f'</summary><div class="maps">{maps}</div></details>'
    )


def _table(target: Values) -> str:
    ordered = sorted(target["rows"], key=lambda row: (row["verdict"] != "FAIL", -badness(row)))
    shown = ordered[:_ROWS]
    left = len(ordered) - len(shown)
    caption = f"{len(shown)} comparisons, worst first"
    if left:
        caption += f"; {left} more not shown"
    heads = ("tensor", "verdict", "mode", "step", "change", "error", "relative", "floor", "bound",
             "error ÷ bound", "role", "note")  # fmt: skip
    head = "".join(
        f'<th scope="col"{" class=num" if 3 <= index <= 9 else ""}>{name}</th>'
        for index, name in enumerate(heads)
    )
    return (
        f"<details><summary>All {len(ordered)} comparisons</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="All comparisons">'
        f'<table class="rows"><caption>{caption}. Change, error, floor and bound are L2 norms in '
        "units of the tensor; relative is error ÷ the larger of change and floor.</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(map(_row, shown))}</tbody></table></div>"
        "</details>"
    )


def _row(row: Values) -> str:
    numbers = [row[key] for key in ("change", "error", "relative", "floor", "bound")]
    ratio = badness(row)
    cells = "".join(f'<td class="num">{number(value)}</td>' for value in (*numbers, ratio))
    note = row["note"]
    if row["tipped"]:
        note = f"{note} gone when moved a few ulps in {row['tipped']} steps".strip()
    css = ' class="fail"' if row["verdict"] == "FAIL" else ""
    words = [escape(row[key]) for key in ("name", "verdict", "mode", "role")]
    return (
        f'<tr{css}><th scope="row" class="name">{words[0]}</th><td>{words[1]}</td>'
        f'<td>{words[2]}</td><td class="num">{int(row["step"])}</td>{cells}'
        f"<td>{words[3]}</td><td>{escape(note)}</td></tr>"
    )


def _tolerances(values: Values) -> str:
    rows = "".join(
        f'<tr><th scope="row" class="name">{escape(name)}</th><td class="num">{value:g}</td>'
        f"<td>{_code(values['reasons'].get(name, ''))}</td></tr>"
        for name, value in values["tolerances"].items()
    )
    return (
        '<h2>Tolerances</h2><div class="scroll" tabindex="0" role="region" '
        'aria-label="Tolerances"><table class="tolerances"><thead><tr><th scope="col">name</th>'
        '<th scope="col" class="num">value</th><th scope="col">what it is, and where it comes from'
        f"</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _ledger(values: Values) -> str:
    ledger = values["ledger"]
    blocks = [
        (title, ledger[key] or {"variables that matter": "none set"})
        for key, title in _LEDGER.items()
    ]
    for name, facts in ledger["targets"].items():
        blocks.append((f"Target {name}", facts or {"facts": "its session tells none"}))
    meaning = {"optimizer": values["optimizer"], **values["semantics"]}
    blocks.append(("What one step means", meaning))
    tables = "".join(
        f"<div><h3>{escape(title)}</h3><table><tbody>{_pairs(block)}</tbody></table></div>"
        for title, block in blocks
    )
    return f'<h2>Determinism ledger</h2><div class="columns">{tables}</div>'


def _pairs(block: Mapping[str, Any]) -> str:
    pairs = flattened(block)
    return "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(text)}</td></tr>' for key, text in pairs
    )


def _code(text: str) -> str:
    return re.sub(r"`{1,2}([^`]+)`{1,2}", r"<code>\1</code>", escape(text))


def _word(ok: bool) -> str:
    return f'<span class="word {"ok" if ok else "bad"}">{"✓ equal" if ok else "✗ not equal"}</span>'


def _max(column: tuple[float | None, ...]) -> float | None:
    return max((value for value in column if value is not None), default=None)


def _numeric(index: int) -> str:
    return ' class="num"' if index >= 3 else ""
